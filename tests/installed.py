"""Installs a wheel into an environment of its own, outside the checkout, and runs its kernels there.

    python -m tests.installed dist/sparsepass-*.whl

torch and the others are those of the Python that runs this: nothing is fetched.
"""

import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

_RUN = """
import sys
from pathlib import Path

import torch

import sparsepass
from sparsepass.graph.native import KINDS, available_paths
from sparsepass.graph.packed import PackedLinear

assert Path(sparsepass.__file__).is_relative_to(sys.prefix), f"another sparsepass was imported: {sparsepass.__file__}"
weight = torch.randn(48, 256)
weight.view(48, 64, 4).scatter_(-1, weight.view(48, 64, 4).abs().topk(2, largest=False).indices, 0.0)
for values in KINDS:
    layer = PackedLinear.from_packed(sparsepass.pack(weight, values=values)).lay_out()
    for tokens in (1, 4, 40):
        x = torch.randn(tokens, 256)
        wanted = x @ sparsepass.unpack(layer.packed()).float().T
        assert (layer(x) - wanted).norm() <= 0.02 * wanted.norm(), (values, tokens)
    print(f"{values}: {layer.path}, of {', '.join(available_paths(values))}")
"""


def kernels_of(wheel: Path) -> str:
    """What the kernels of an installed wheel say of themselves: for each kind of values, which are used and which there are."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder)
        python = Path(folder, "bin", "python")
        install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*install, str(wheel.resolve())], check=True)
        # Paths in a .pth file come last, and .pth files that lie there are not read: an editable sparsepass stays out of sight.
        (site,) = Path(folder).glob("lib/python*/site-packages")
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        return subprocess.run([python, "-I", "-c", _RUN], cwd=folder, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{argument}\n{kernels_of(Path(argument))}", end="")
