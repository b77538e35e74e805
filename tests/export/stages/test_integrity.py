"""Planted faults: whatever is changed in what was written, `verify` or `compare` tells, and names the file or the tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors
import safetensors.torch
from onnx import numpy_helper
from tests.export.tiny import WORDS, save_tiny_llama
from torch import Tensor
from typer.testing import CliRunner

from sparsepass.export.cli.app import app
from sparsepass.export.stages.exporting import export
from sparsepass.export.stages.preparing import prepare, write_program
from sparsepass.graph import Program
from sparsepass.graph.support import CHECKSUMS_FILE, ChecksumWarning, SparsepassError, write_checksums
from sparsepass.passes.masks import pack_program

UP, GATE = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
MASK = "model.layers.0.mlp.up_proj.mask"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind, and a mask pack, all of one tiny model."""
    place = tmp_path_factory.mktemp("written")
    model = save_tiny_llama(place / "model")
    text = place / "text.txt"
    text.write_text(WORDS * 40)
    write_program(prepare(model, passes="nm_sparsify", validate=False), place / "program")
    for target in ("hf", "onnx", "packed"):
        export(place / "program", target, place / target)
    pack_program(Program.load(place / "program")).save(place / "masks.safetensors")
    return place


def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, " ".join(found.output.split())


def of_json(name: str, change: Callable[[Any], object]) -> Damage:
    def damage(place: Path) -> None:
        document = json.loads((place / name).read_text(encoding="utf-8"))
        change(document)
        (place / name).write_text(json.dumps(document), encoding="utf-8")

    return damage


def of_tensors(name: str, change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(place: Path) -> None:
        tensors = safetensors.torch.load_file(place / name)
        with safetensors.safe_open(place / name, "pt") as file:
            about = file.metadata()
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        change(tensors)
        safetensors.torch.save_file({key: t.contiguous() for key, t in tensors.items()}, place / name, about)

    return damage


def of_graph(change: Callable[[onnx.ModelProto], object]) -> Damage:
    def damage(place: Path) -> None:
        proto = onnx.load(place / "model.onnx")
        change(proto)
        onnx.save(proto, place / "model.onnx")

    return damage


def initializer(proto: onnx.ModelProto, name: str, change: Callable[[Any], Any]) -> None:
    found = next(each for each in proto.graph.initializer if each.name == name)
    found.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(found).copy()), name))


def exchange_tokens(document: Any) -> None:
    vocabulary = document["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def move_mask(tensors: dict[str, Tensor]) -> None:
    group = tensors[MASK][0, :4]
    kept, left = int(group.nonzero()[0]), int((~group).nonzero()[0])
    group[kept], group[left] = False, True


def add_to_mask(tensors: dict[str, Tensor]) -> None:
    row = tensors[MASK][0]
    row[int((~row).nonzero()[0])] = True


def swapped(one: str, other: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.update({one: t[other], other: t[one]})


def scaled(name: str, by: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t[name].mul_(by)


GENERATION, TOKENIZER, CONFIG = "generation_config.json", "tokenizer.json", "config.json"
WEIGHTS, PROGRAM, TENSORS, REPORT = "model.safetensors", "program.json", "program.safetensors", "report.json"
SAMPLES, SETTINGS = "samples/samples.safetensors", "tokenizer_config.json"
NORM = "model.norm.weight"
EOS: dict[str, Any] = {"eos_token_id": 7}

# Name -> the folder, what is done to it, and what is told.
PLANTED: dict[str, tuple[str, Damage, str]] = {
    "mask entry added": ("program", of_tensors(TENSORS, add_to_mask), TENSORS),
    "mask entry moved": ("program", of_tensors(TENSORS, move_mask), TENSORS),
    "masks of two layers swapped": ("program", of_tensors(TENSORS, swapped(MASK, MASK.replace("up", "gate"))), TENSORS),
    "weight scaled a little": ("program", of_tensors(TENSORS, scaled(UP, 1 + 1e-6)), TENSORS),
    "weights of two layers swapped": ("program", of_tensors(TENSORS, swapped(UP, GATE)), TENSORS),
    "example inputs changed": ("program", of_tensors(TENSORS, lambda t: t["example_inputs/input_ids"].add_(1)), TENSORS),
    "sparse state removed": ("program", of_json(PROGRAM, lambda d: d["sparse"].pop(UP)), PROGRAM),
    "pattern renamed": ("program", of_json(PROGRAM, lambda d: d["sparse"][UP].update(pattern="4:8")), PROGRAM),
    "history edited": ("program", of_json(PROGRAM, lambda d: d["history"][0].update(seconds=0.0)), PROGRAM),
    "origin edited": ("program", of_json(PROGRAM, lambda d: d["origin"]["config"].update(EOS)), PROGRAM),
    "program's tokenizer exchanged": ("program", of_json(TOKENIZER, exchange_tokens), TOKENIZER),
    "program's tokenizer settings": ("program", of_json(SETTINGS, lambda d: d.update(bos_token="</s>")), SETTINGS),
    "program's generation settings": ("program", of_json(GENERATION, lambda d: d.update(EOS)), GENERATION),
    "program's recipe": ("program", lambda p: (p / "recipe.txt").write_text("slorb"), "recipe.txt"),
    "a file added": ("program", lambda p: (p / CONFIG).write_text("{}"), CONFIG),
    "weights added": ("program", lambda p: shutil.copy(p / TENSORS, p / WEIGHTS), WEIGHTS),
    "a chat template added": ("hf", lambda p: (p / "chat_template.jinja").write_text("x"), "chat_template.jinja"),
    "hf weight scaled": ("hf", of_tensors(WEIGHTS, scaled(UP, 1 + 1e-6)), WEIGHTS),
    "hf weights swapped": ("hf", of_tensors(WEIGHTS, swapped(UP, GATE)), WEIGHTS),
    "hf layer dense": ("hf", of_tensors(WEIGHTS, lambda t: t[UP].add_(1)), UP),
    "hf norm": ("hf", of_tensors(WEIGHTS, scaled(NORM, 1.01)), WEIGHTS),
    "hf rope": ("hf", of_json(CONFIG, lambda d: d["rope_parameters"].update(rope_theta=2e4)), CONFIG),
    "hf epsilon": ("hf", of_json(CONFIG, lambda d: d.update(rms_norm_eps=1e-3)), CONFIG),
    "hf activation": ("hf", of_json(CONFIG, lambda d: d.update(hidden_act="gelu")), CONFIG),
    "hf eos": ("hf", of_json(CONFIG, lambda d: d.update(EOS)), CONFIG),
    "hf bos": ("hf", of_json(CONFIG, lambda d: d.update(bos_token_id=5)), CONFIG),
    "hf generation eos": ("hf", of_json(GENERATION, lambda d: d.update(EOS)), GENERATION),
    "hf generation temperature": ("hf", of_json(GENERATION, lambda d: d.update(temperature=9.0)), GENERATION),
    "hf tokenizer": ("hf", of_json(TOKENIZER, exchange_tokens), TOKENIZER),
    "hf card": ("hf", lambda p: (p / "README.md").write_text("# Better"), "README.md"),
    "hf samples": ("hf", of_tensors(SAMPLES, lambda t: t["outputs/logits"].mul_(2)), SAMPLES),
    "report: expected weights emptied": ("hf", of_json(REPORT, lambda d: d["artifact"]["expected_sparse"][""].clear()), REPORT),
    "report: a weight less": ("hf", of_json(REPORT, lambda d: d["artifact"]["expected_sparse"][""].pop(UP)), REPORT),
    "report: pattern": ("hf", of_json(REPORT, lambda d: d["artifact"]["expected_sparse"][""].update({UP: "1:4"})), REPORT),
    "report: verification": ("hf", of_json(REPORT, lambda d: d["verification"].update(held=False)), REPORT),
    "report: figures": ("hf", of_json(REPORT, lambda d: d["verification"]["checks"][0].update(summary="0.0")), REPORT),
    "report: model": ("program", of_json(REPORT, lambda d: d["model"].update(source="some/one")), REPORT),
    "report: recipe": ("program", of_json(REPORT, lambda d: d.update(recipe="slorb")), REPORT),
    "report: command": ("program", of_json(REPORT, lambda d: d["runs"][0].update(command="true")), REPORT),
    "report: removed": ("hf", lambda p: (p / REPORT).unlink(), REPORT),
    "report: page": ("hf", lambda p: (p / "report.html").write_text("<html>sparsepass</html>"), "report.html"),
    "report: markdown": ("hf", lambda p: (p / "report.md").write_text("sparsepass"), "report.md"),
    "onnx weight": ("onnx", of_graph(lambda m: initializer(m, UP, lambda w: w * w.dtype.type(1 + 1e-5))), "model.onnx"),
    "onnx layer dense": ("onnx", of_graph(lambda m: initializer(m, UP, lambda w: w + w.dtype.type(1))), UP),
    "onnx norm": ("onnx", of_graph(lambda m: initializer(m, NORM, lambda w: w * w.dtype.type(1.01))), "model.onnx"),
    "onnx outputs renamed": ("onnx", of_graph(lambda m: m.graph.output[0].type.Clear()), "model.onnx"),
    "onnx eos": ("onnx", of_json(CONFIG, lambda d: d.update(EOS)), CONFIG),
    "onnx generation": ("onnx", of_json(GENERATION, lambda d: d.update(EOS)), GENERATION),
    "onnx tokenizer": ("onnx", of_json(TOKENIZER, exchange_tokens), TOKENIZER),
    "onnx samples": ("onnx", of_tensors(SAMPLES, lambda t: t["outputs/logits"].mul_(2)), SAMPLES),
    "onnx inputs": ("onnx", of_tensors(SAMPLES, lambda t: t["inputs/input_ids"].add_(1)), SAMPLES),
    "onnx samples removed": ("onnx", lambda p: shutil.rmtree(p / "samples"), SAMPLES),
    "packed weight": ("packed", of_tensors(WEIGHTS, lambda t: t[UP].view(-1)[:1].add_(1)), WEIGHTS),
    "packed codes": ("packed", of_tensors(WEIGHTS, lambda t: t[UP.replace("weight", "codes")].view(-1)[:1].add_(1)), UP),
    "packed norm": ("packed", of_tensors(WEIGHTS, scaled(NORM, 1.01)), WEIGHTS),
    "packed eos": ("packed", of_json(CONFIG, lambda d: d.update(EOS)), CONFIG),
    "packed tokenizer": ("packed", of_json(TOKENIZER, exchange_tokens), TOKENIZER),
    "packed generation": ("packed", of_json(GENERATION, lambda d: d.update(EOS)), GENERATION),
    "packed report": ("packed", of_json(REPORT, lambda d: d["model"].update(source="some/one")), REPORT),
    "checksums: one changed": ("hf", of_json(CHECKSUMS_FILE, lambda d: d["files"][WEIGHTS].update(sha256="0" * 64)), WEIGHTS),
    "checksums: one removed": ("hf", of_json(CHECKSUMS_FILE, lambda d: d["files"].pop(CONFIG)), CONFIG),
}  # fmt: skip

# The same where the checksums were written anew, as by who means harm: what is told rests on the contents.
RENEWED: dict[str, tuple[str, Damage, str, str]] = {
    "sparse state removed": (*PLANTED["sparse state removed"][:2], "verify", UP),
    "mask entry added": (*PLANTED["mask entry added"][:2], "verify", "model.layers.0.mlp.up_proj"),
    "hf layer dense": (*PLANTED["hf layer dense"][:2], "verify", UP),
    "onnx layer dense": (*PLANTED["onnx layer dense"][:2], "verify", UP),
    "report: recipe": (*PLANTED["report: recipe"][:2], "verify", "report.json is of another program"),
    "report: counts": ("program", of_json(REPORT, lambda d: d["passes"].update(num_sparse=3)), "verify", "report.json"),
    "sparse state removed, compared": (*PLANTED["sparse state removed"][:2], "compare", UP),
    "weights swapped": (*PLANTED["weights of two layers swapped"][:2], "compare", "logits"),
    "program's tokenizer": (*PLANTED["program's tokenizer exchanged"][:2], "compare", TOKENIZER),
    "program's generation settings": (*PLANTED["program's generation settings"][:2], "compare", "eos_token_id"),
    "origin edited": (*PLANTED["origin edited"][:2], "compare", "eos_token_id"),
    "hf eos": (*PLANTED["hf eos"][:2], "compare", "eos_token_id"),
    "hf bos": (*PLANTED["hf bos"][:2], "compare", "bos_token_id"),
    "hf temperature": (*PLANTED["hf generation temperature"][:2], "compare", "temperature"),
    "hf tokenizer": (*PLANTED["hf tokenizer"][:2], "compare", TOKENIZER),
    "hf rope": (*PLANTED["hf rope"][:2], "compare", "logits"),
    "onnx tokenizer": (*PLANTED["onnx tokenizer"][:2], "compare", TOKENIZER),
    "onnx eos": (*PLANTED["onnx eos"][:2], "compare", "eos_token_id"),
    "onnx generation": (*PLANTED["onnx generation"][:2], "compare", GENERATION),
}  # fmt: skip


def damaged(written: Path, tmp_path: Path, kind: str, damage: Damage) -> Path:
    place = shutil.copytree(written / kind, tmp_path / kind)
    damage(place)
    return place


def test_there_are_enough_of_them() -> None:
    assert len(PLANTED) >= 60


@pytest.mark.parametrize("name", PLANTED)
def test_verify_catches_it_and_names_the_file(name: str, written: Path, tmp_path: Path) -> None:
    kind, damage, told = PLANTED[name]
    code, said = run("verify", damaged(written, tmp_path, kind, damage))
    assert code == (2 if name == "packed codes" else 1), said  # such codes cannot be read at all
    assert told in said


@pytest.mark.parametrize("name", RENEWED)
def test_it_is_caught_by_the_contents_too(name: str, written: Path, tmp_path: Path) -> None:
    kind, damage, command, told = RENEWED[name]
    place = damaged(written, tmp_path, kind, damage)
    write_checksums(place)
    code, said = run(command, *([written / "program"] if command == "compare" else []), place)
    assert code == 1, said
    assert told in said


@pytest.mark.parametrize("kind", ["program", "hf", "onnx", "packed"])
def test_what_was_written_passes(kind: str, written: Path) -> None:
    code, said = run("verify", written / kind)
    assert code == 0, said
    if kind != "packed":
        code, said = run("compare", written / "program", written / kind)
        assert code == 0, said


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: next(iter(t.values())).view(-1)[:1].add_(1),
        lambda t: t.update(dict(zip(t, reversed([*t.values()]), strict=True))),
    ],
)
def test_an_edited_mask_pack_is_refused(damage: Callable[[dict[str, Tensor]], object], written: Path, tmp_path: Path) -> None:
    assert run("verify", written / "masks.safetensors")[0] == 0
    shutil.copy(written / "masks.safetensors", tmp_path)
    of_tensors("masks.safetensors", damage)(tmp_path)
    for command in (["verify"], ["masks"]):
        code, said = run(*command, tmp_path / "masks.safetensors")
        assert code == 2
        assert "masks.safetensors" in said


def test_an_edit_of_ones_own_is_renewed(written: Path, tmp_path: Path) -> None:
    place = damaged(written, tmp_path, "hf", lambda p: (p / "README.md").write_text("# Mine"))
    code, said = run("verify", place, "--renew")
    assert code == 0
    assert "README.md is not as it was written" in said
    assert f"{CHECKSUMS_FILE} was written anew" in said
    assert run("verify", place)[0] == 0


def test_what_does_not_hold_is_not_renewed(written: Path, tmp_path: Path) -> None:
    place = damaged(written, tmp_path, *PLANTED["hf layer dense"][:2])
    before = (place / CHECKSUMS_FILE).read_bytes()
    assert run("verify", place, "--renew")[0] == 1
    assert (place / CHECKSUMS_FILE).read_bytes() == before
    code, said = run("verify", written / "model", "--renew")
    assert code == 2
    assert "name a folder that sparsepass wrote" in said


def test_loading_refuses_an_edited_program_and_warns_of_the_rest(written: Path, tmp_path: Path) -> None:
    from sparsepass.graph.load import load_model

    for index, name in enumerate(("history edited", "weight scaled a little")):
        place = damaged(written, tmp_path / str(index), *PLANTED[name][:2])
        with pytest.raises(SparsepassError, match=f"{PLANTED[name][2]} is not as it was written.*verify --renew"):
            load_model(place)
    place = damaged(written, tmp_path, *PLANTED["program's generation settings"][:2])
    with pytest.warns(ChecksumWarning, match=f"{GENERATION} is not as it was written"):
        load_model(place)


def test_fields_that_a_program_may_leave_out_are_none(written: Path, tmp_path: Path) -> None:
    place = tmp_path / "program"
    shutil.copytree(written / "program", place)
    of_json("program.json", lambda document: (document.pop("retraining"), document.pop("limits")))(place)
    code, said = run("verify", place, "--renew")
    assert code == 0, said


def test_the_pages_of_a_report_may_be_rendered_anew(written: Path, tmp_path: Path) -> None:
    place = damaged(written, tmp_path, "program", lambda p: None)
    assert run("report", place)[0] == 0
    assert run("verify", place, "--report", place)[0] == 0
    assert run("verify", place)[0] == 0
