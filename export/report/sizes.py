"""What `sparsepass size` counted and measured, as a section of report.json; its view is in `section_views.py`."""

from pydantic import Field

from sparsepass.export.report.parts import Part
from sparsepass.export.report.words import size


class FormEntry(Part):
    """A form of a model, and what it takes."""

    form: str = Field(description="such as `2:4 int4, SLoRB k=16, embedding int8`; `dense` holds all values, zeros too")
    values_bytes: int = Field(description="values of the layers that passes take, the kept ones if there is a pattern")
    indices_bytes: int = Field(description="places of the kept values")
    scales_bytes: int = Field(description="scales of these layers' integers")
    branches_bytes: int = Field(description="SLoRB branches")
    embedding_bytes: int = Field(description="embedding and output head, one tensor where they are tied; their scales too")
    others_bytes: int = Field(description="all else: norms, biases, routers, tables of positions")

    @property
    def layers_bytes(self) -> int:
        """What stands for the layers that passes take."""
        return self.values_bytes + self.indices_bytes + self.scales_bytes + self.branches_bytes

    @property
    def total_bytes(self) -> int:
        """The whole model."""
        return self.layers_bytes + self.embedding_bytes + self.others_bytes


class FileSizeEntry(Part):
    """What a file or folder takes."""

    source: str = Field(description="the file or folder")
    bytes: int = Field(description="its files with weights")
    form: str | None = Field(default=None, description="the form that its configuration states; null if it states none")
    promised_bytes: int | None = Field(
        default=None, description="what that form takes, counted; headers of files are not in it"
    )


class SizeSection(Part):
    """What `sparsepass size` counted from the shapes of a model's tensors, and measured of files that hold it."""

    model: str = Field(description="what the user named")
    pattern: str = Field(description="N:M of the forms that have a pattern")
    group_size: int = Field(description="input features that share a scale, one bfloat16 for each; 0 for one a row")
    num_layers: int = Field(description="layers that passes take")
    num_layer_weights: int = Field(description="their weights")
    num_parameters: int = Field(description="numbers of the whole model, tied ones once")
    forms: list[FormEntry] = Field(description="one entry a form, the first of them dense float32, the second dense bfloat16")
    files: list[FileSizeEntry] = Field(default=[], description="one entry a file or folder")

    @property
    def paper(self) -> str | None:
        """What a factor of 16 leaves out, which papers give for 2:4 and int4; None for another pattern."""
        whole = self.forms[0]
        small = next((form for form in self.forms if form.form == "2:4 int4"), None)
        if small is None or not whole.values_bytes:
            return None
        best = self.forms[-1]
        left = size(small.indices_bytes), size(small.scales_bytes), size(small.embedding_bytes), size(small.others_bytes)
        return (
            f"16 times, as papers say of 2:4 and int4, is float32 against the kept values alone ({size(whole.values_bytes)} "
            f"and {size(small.values_bytes)}). It leaves out the places of the kept values ({left[0]}), "
            f"scales ({left[1]}), embedding and head ({left[2]}) and all else ({left[3]}). With all of it 2:4 int4 is "
            f"{whole.total_bytes / small.total_bytes:.1f} times smaller than float32 and "
            f"{self.forms[1].total_bytes / small.total_bytes:.1f} times smaller than bfloat16; {best.form}: "
            f"{whole.total_bytes / best.total_bytes:.1f} and {self.forms[1].total_bytes / best.total_bytes:.1f} times"
        )
