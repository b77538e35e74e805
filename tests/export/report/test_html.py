"""report.html: what it says, that nothing in a report can break out of it, its size, and how browsers take it."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.export.cli.commands import run
from tests.export.report.browser import SIZES_OF_PICTURES, Browser, browser
from tests.export.report.reports import answers, full_report, html_page, lines, markdown_page, record
from tests.export.tiny import save_tiny_llama

from sparsepass.export.report.document import new_report, plain_json, read_report, write_report
from sparsepass.export.report.layers import LayerFacts, joined_names, layer_facts
from sparsepass.export.report.schema import ReportDocument, check_report
from sparsepass.export.report.training import retraining_run

EVIL = "</style></title></script><script>document.title='broken'</script><img src=x onerror=alert(1)>\"'&\x00"
KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
UNKNOWN = "no GPU here: tensorrt-rtx built ahead of time, and its kernels are picked on the GPU that loads the engine"


def large_report(num_blocks: int) -> dict[str, Any]:
    """A report of a full run with seven layers a block, two engines, a plan, and a check of the stored weights."""
    names = [f"model.layers.{block}.{kind}" for block in range(num_blocks) for kind in KINDS]
    document = full_report() | {"retraining": {"runs": [_run(names)]}}
    outcomes: list[dict[str, Any]] = [
        {"site": name, "weight": f"{name}.weight", "shape": [4096, 4096], "action": "rewritten", "reason": "",
         "facts": {"relative_error": 0.1 + index / 9000, "tokens": 8192}}
        for index, name in enumerate(names)
    ]  # fmt: skip
    passes = [
        {**document["passes"]["passes"][0], "text": text, "outcomes": outcomes}
        for text in ("nm_sparsify{pattern=2:4}", "slorb{k=16}")
    ]
    layers = {name: {"pattern": "2:4", "zeros": 0.5, "branch_k": 16} for name in names}
    document["passes"] = {"num_sites": len(names) + 1, "num_sparse": len(names), "passes": passes, "layers": layers,
                          "skipped": {"lm_head": "output head: pruning it costs much accuracy"}}  # fmt: skip
    known: dict[str, Any] = {
        "conforms": "yes",
        "flag_requested": "yes",
        "eligible": "unknown",
        "chosen": "unknown",
        "ran_sparse": "unknown",
    }
    document["sparsity"]["engines"] = [document["sparsity"]["engines"][0] | {"name": name} for name in ("prefill", "decode")]
    document["sparsity"]["layers"] = [
        known | {"engine": engine, "layer": "n", "weight": f"{name}.weight", "shape": [4096, 4096], "reason": UNKNOWN}
        for engine in ("prefill", "decode") for name in names
    ]  # fmt: skip
    document["plan"] = plan_of(names)
    document["pattern"] = {"conforms": True, "reports": [_checked(names)]}
    return check_report(plain_json(document))


def plan_of(names: list[str]) -> dict[str, Any]:
    times = {"dense_s": 3e-3, "planned_s": 2e-3, "speedup": 1.5}
    return {
        "model": "m", "device": {"title": "NVIDIA A100"}, "runtime": {"name": "tensorrt-llm"}, "dtype": "bf16", "pays": True,
        "points": [{"batch": 1, "seq": 2048, "new_tokens": 128, "prefill": times, "decode": {**times, "speedup": 0.9}}],
        "memory": [{"dtype": "bf16", "dense_bytes": 16e9, "planned_bytes": 9e9, "everything_bytes": 9e9}],
        "layers": [
            {"name": name, "weight": f"{name}.weight", "out_features": 4096, "in_features": 4096, "num_experts": 1,
             "decision": "2:4", "reason": "1.50x faster over the request", "prefill": {"dense_s": 3e-5, "sparse_s": 2e-5},
             "decode": {"dense_s": 1e-6, "sparse_s": None}}
            for name in names
        ],
        "ignore": [], "passes": "nm_sparsify", "notes": ["a note"],
    }  # fmt: skip


def _run(names: list[str]) -> dict[str, Any]:
    moved = {f"{name}.weight": index / 1e5 for index, name in enumerate(names)}
    return retraining_run(record(400, flips_since_first_by_layer=moved), lines(400))


def _checked(names: list[str]) -> dict[str, Any]:
    entries = [
        {"weight": f"{name}.weight", "verdict": "conforms", "shape": [64, 64], "axis": 1, "num_groups": 1024, "required": True,
         "num_nonzeros": 2048, "num_violations": 0, "reason": ""} for name in names
    ]  # fmt: skip
    return {"source": "out", "pattern": "2:4", "conforms": True, "counts": {"conforms": len(names)}, "entries": entries}


def facts_of(document: dict[str, Any]) -> list[LayerFacts]:
    return layer_facts(ReportDocument.parse(document))


class Structure(HTMLParser):
    """Whether every element is closed where it should be, and which there are."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.ids: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        assert not any(name.startswith("on") or name in ("src", "action", "srcset") for name, _ in attrs)
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def shared() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("page") / "report.html"
    place.write_text(html_page(large_report(30)), encoding="utf-8")
    return place


def reports() -> dict[str, dict[str, Any]]:
    whole = large_report(2)
    header = {name: whole[name] for name in ("schema", "schema_version", "recipe", "runs")}
    stages: dict[str, tuple[str, ...]] = {
        "prune": ("model", "passes"),
        "retrain": ("model", "passes", "retraining", "accuracy"),
        "onnx": ("model", "passes", "artifact", "verification", "samples"),
        "tensorrt": ("model", "passes", "artifact", "verification", "samples", "sparsity"),
        "plan": ("plan",),
        "verify": ("pattern",),
        "whole": tuple(name for name in whole if name not in header),
    }
    found = {stage: header | {name: whole[name] for name in names} for stage, names in stages.items()}
    return found | {"empty": new_report(), "sample": check_report(full_report())}


@pytest.mark.parametrize("stage", reports())
def test_every_stage_has_a_page(stage: str) -> None:
    document = reports()[stage]
    text = html_page(document)
    found = Structure(text)
    assert found.open == []
    assert len(set(found.ids)) == len(found.ids)
    assert found.names.count("script") == 1
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(found.ids)
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL))
    assert text == html_page(document), "the same report, the same bytes"
    assert all(answer.sentences and answer.short for answer in answers(document))
    assert all(answer.question in markdown_page(document) for answer in answers(document))


def planted(value: Any) -> Any:
    """The same report with something evil in every text and every name that a model may bring."""
    if isinstance(value, dict):
        return {key: planted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [planted(item) for item in value]
    return (
        value + EVIL
        if isinstance(value, str) and value not in ("yes", "no", "unknown", "rewritten", "approximate", "2:4")
        else value
    )


def evil_report() -> dict[str, Any]:
    document = planted(large_report(2)) | {"schema": "sparsepass-report", "an" + EVIL: {"x": EVIL}}
    for section, name in (("passes", "skipped"), ("passes", "layers"), ("artifact", "files"), ("samples", "inputs")):
        document[section][name] = {key + EVIL: value for key, value in document[section][name].items()}
    run = document["retraining"]["runs"][0]
    run["flips_by_layer"] = {key + EVIL: value for key, value in run["flips_by_layer"].items()}
    document["recipe"] = EVIL
    return check_report(document)


def test_no_text_of_a_report_becomes_markup(tmp_path: Path) -> None:
    text = html_page(evil_report())
    assert "<img" not in text
    assert text.count("<script>") == text.count("</script>") == 1
    assert text.count("</style>") == 1
    assert "\x00" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert Structure(text).open == []


def test_a_browser_runs_nothing_that_was_planted(shared: Browser, tmp_path: Path) -> None:
    (tmp_path / "evil.html").write_text(html_page(evil_report()), encoding="utf-8")
    shared.open(tmp_path / "evil.html")
    assert shared.messages == []
    assert len(shared.requests) == 1
    assert shared.value("document.title").startswith("sparsepass report: ")
    assert shared.value("document.images.length") == 0
    assert "<script>document.title='broken'</script>" in shared.value("document.body.innerText")
    # Were something overlooked, the page's own policy would stop it.
    shared.value("document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 1'}))")
    shared.value("document.body.append(Object.assign(document.createElement('img'), {src: 'other.png'}))")
    assert shared.value("document.title").startswith("sparsepass report: ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_draws_every_picture_within_the_page(scheme: str, width: int, shared: Browser, page: Path) -> None:
    shared.open(page, width=width, scheme=scheme)
    assert shared.messages == []
    drawn = shared.value(SIZES_OF_PICTURES)
    assert len(drawn) >= 14
    assert all(across > 50 and down > 30 for across, down in drawn)
    assert shared.value("document.documentElement.scrollWidth") <= width
    assert shared.value("[...document.querySelectorAll('svg')].every(s => s.querySelector('title').textContent)")
    assert shared.value("[...document.querySelectorAll('table')].every(t => t.querySelector('thead th[scope=col]'))")
    colours = "getComputedStyle(document.body).backgroundColor + getComputedStyle(document.body).color"
    background, ink = re.findall(r"\d+, \d+, \d+", shared.value(colours))
    assert (sum(map(int, background.split(", "))) > sum(map(int, ink.split(", ")))) == (scheme == "light")


def test_texts_stand_out_from_what_is_behind_them(shared: Browser, page: Path) -> None:
    """Contrast of 4.5 to 1 (WCAG AA), in both schemes, on the page and in pictures."""
    contrast = """(() => {
      const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
        .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const behind = (e) => { const c = getComputedStyle(e).backgroundColor;
        return /rgba\\(.*, 0\\)/.test(c) ? behind(e.parentElement) : c; };
      let least = 99;
      for (const e of document.querySelectorAll("p,dt,dd,b,td,th,a,code,figcaption,span,summary,svg text")) {
        const s = getComputedStyle(e), a = light(e.closest("svg") ? s.fill : s.color), b = light(behind(e));
        least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
      }
      return least;
    })()"""
    for scheme in ("light", "dark"):
        shared.open(page, scheme=scheme)
        assert shared.value(contrast) >= 4.5, scheme


def test_the_page_is_whole_without_scripts_and_on_paper(shared: Browser, page: Path) -> None:
    shared.open(page, script=False)
    assert shared.messages == []
    assert shared.value("document.querySelectorAll('.filter, th button').length") == 0
    assert "model.layers.29.mlp.down_proj" in shared.value("document.body.innerText")
    assert len(shared.value(SIZES_OF_PICTURES)) >= 14
    shared.open(page, media="print")
    clipped = "[...document.querySelectorAll('.scroll')].filter(s => s.scrollHeight > s.clientHeight + 1).length"
    assert shared.value(clipped) == 0
    assert shared.value("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_the_table_of_layers_is_sorted_and_filtered(shared: Browser, page: Path) -> None:
    shared.open(page)
    first = "document.querySelector('table.layers tbody tr:not([hidden])').cells[0].textContent"
    button = "[...document.querySelectorAll('table.layers thead button')].find(b => b.textContent.includes('{}'))"
    shared.value(f"{button.format('error after nm_sparsify')}.click()")
    assert shared.value(first) == "model.layers.29.mlp.down_proj", "the largest error comes first"
    head = f"{button.format('error after nm_sparsify')}.parentElement.ariaSort"
    assert shared.value(head) == "descending"
    shared.value(f"{button.format('layer')}.click()")
    assert shared.value(first) == "lm_head"
    shared.value(f"{button.format('layer')}.click()")
    assert shared.value(first) == "model.layers.29.self_attn.v_proj", "numbers count as numbers"
    field = "document.querySelector('table.layers').parentElement.previousElementSibling.querySelector('input')"
    shared.value(f"{{ const i = {field}; i.value = 'layers.7. q_proj'; i.dispatchEvent(new Event('input')); }}")
    assert shared.value(first) == "model.layers.7.self_attn.q_proj"
    assert shared.value("document.querySelectorAll('table.layers tbody tr:not([hidden])').length") == 1


def test_a_thousand_layers_stay_small(shared: Browser, tmp_path: Path) -> None:
    document = large_report(143)
    assert len(facts_of(document)) == 1002
    text = html_page(document)
    assert len(text.encode()) < 2_000_000
    (tmp_path / "large.html").write_text(text, encoding="utf-8")
    shared.open(tmp_path / "large.html")
    assert shared.messages == []
    assert shared.value("document.querySelectorAll('table.layers tbody tr').length") == 1002


def test_the_answers_follow_the_evidence() -> None:
    def answer(document: dict[str, Any]) -> tuple[str, str]:
        found = next(each for each in answers(document) if "runtime" in each.question)
        return found.tone, found.short

    document = large_report(2)
    assert answer(document) == ("unknown", "unknown")
    told = next(each for each in answers(document) if "runtime" in each.question).sentences
    assert any(UNKNOWN in sentence for sentence in told)
    assert "sparse-export FOLDER --target tensorrt" in told[-1]
    for layer in document["sparsity"]["layers"][:20]:
        layer["ran_sparse"] = layer["chosen"] = "yes"
    assert answer(document) == ("good", "yes for 20 of 28")
    for layer in document["sparsity"]["layers"]:
        layer |= {"ran_sparse": "no", "chosen": "no", "reason": "dense tactic faster"}
    assert answer(document) == ("bad", "no")
    del document["sparsity"]
    assert answer(document) == ("unknown", "unknown")
    document["passes"]["num_sparse"] = 0
    assert answer(document) == ("plain", "nothing is sparse")


def test_accuracy_is_told_with_what_training_won_back() -> None:
    document = large_report(2)
    figures = document["accuracy"]["measurements"][0]
    values = {"dense": 10.0, "2:4": 40.0, "2:4, retrained": 20.0}
    document["accuracy"]["measurements"] = [figures | {"name": name, "perplexity": value} for name, value in values.items()]
    (found,) = [each for each in answers(document) if "accuracy" in each.question]
    assert found.short == "2.00 times the perplexity of dense"
    assert any("closed 50% of the gap" in sentence for sentence in found.sentences)
    assert any("do NOT compute what the program computes: they differ" in sentence for sentence in found.sentences)
    del document["verification"]
    document["accuracy"]["measurements"][2]["perplexity"] = 80.0
    (found,) = [each for each in answers(document) if "accuracy" in each.question]
    assert found.tone == "bad"
    assert any("the gap that pruning had opened grew by 50%" in sentence for sentence in found.sentences)
    document["accuracy"]["measurements"][2]["perplexity"] = "inf"
    (found,) = [each for each in answers(document) if "accuracy" in each.question]
    assert "inf" not in found.short
    del document["accuracy"]
    (found,) = [each for each in answers(document) if "accuracy" in each.question]
    assert (found.tone, found.short) == ("unknown", "not measured")


def test_layers_are_brought_together_from_all_sections() -> None:
    found = {layer.name: layer for layer in facts_of(large_report(2))}
    layer = found["model.layers.1.mlp.up_proj"]
    assert (layer.pattern, layer.zeros, layer.notes) == ("2:4", 0.5, ("SLoRB k=16",))
    assert list(layer.errors) == ["nm_sparsify", "slorb"]
    assert layer.flips == pytest.approx(12e-5)
    assert layer.gains == {"prefill": pytest.approx(1.5)}
    assert layer.ran == {"prefill": "unknown", "decode": "unknown"}
    assert found["lm_head"].skipped.startswith("output head")
    assert found["lm_head"].pattern == ""


def test_names_of_layers_are_written_as_ranges() -> None:
    assert joined_names([f"h.{i}.up" for i in (0, 1, 2, 5, 7, 8)]) == "h.0-2,5,7-8.up"
    assert joined_names(["a", "b", "c", "d", "e"]) == "a, b, c, d and 1 more"


def test_the_command_renders_a_page_from_the_json_alone(tmp_path: Path) -> None:
    for name in ("whole", "alone"):
        (tmp_path / name).mkdir()
    written = write_report(tmp_path / "whole", large_report(2))
    (tmp_path / "whole" / "report.json").rename(tmp_path / "alone" / "report.json")
    result = run("report", tmp_path / "alone")
    assert result.exit_code == 0, result.output
    assert "report.html there tells everything" in result.output
    told = " ".join(result.output.split())
    for answer in answers(written):
        assert answer.question in told
        assert answer.short in told, "the terminal tells in short what the page tells"
    assert (tmp_path / "alone" / "report.html").read_text() == html_page(written)
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"report.json", "report.html", "report.md", "figures"}
    assert (tmp_path / "alone" / "figures" / "retraining-1-loss.svg").is_file()
    result = run("report", tmp_path / "alone" / "report.json", "-o", tmp_path / "elsewhere")
    assert result.exit_code == 0
    assert (tmp_path / "elsewhere" / "report.html").is_file()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"schema": "sparsepass-report", "schema_version": 99}, "upgrade sparsepass"),
        ({"schema": "other"}, "no sparsepass report"),
        (None, "does not exist"),
    ],
)
def test_a_newer_or_foreign_report_is_refused(content: dict[str, Any] | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(json.dumps(content))
    before = sorted(tmp_path.iterdir())
    result = run("report", tmp_path)
    assert result.exit_code == 2
    assert said in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_an_older_report_without_later_fields_has_a_page() -> None:
    document = full_report()
    assert "layers" not in document["passes"]
    found = {layer.name: layer for layer in facts_of(document)}
    assert (found["a"].pattern, found["a"].zeros) == ("2:4", None)
    assert "1 of 2 linear layers are 2:4 sparse" in html_page(check_report(document))


def test_plan_and_verify_add_to_a_report(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "tiny")
    assert run("prune", tmp_path / "tiny", "-o", tmp_path / "pruned", "--no-validate").exit_code == 0
    zeros = read_report(tmp_path / "pruned")["passes"]["layers"]
    assert {facts["zeros"] for facts in zeros.values()} == {0.5}
    assert len(zeros) == 14
    recipe = (tmp_path / "pruned" / "recipe.txt").read_text()
    planned = run("plan", tmp_path / "tiny", "--gpu", "a100", "--seq", 16, "--new-tokens", 8, "--report", tmp_path / "pruned")
    assert planned.exit_code in (0, 1), planned.output
    assert run("verify", tmp_path / "pruned", "--report", tmp_path / "pruned").exit_code == 0
    report = read_report(tmp_path / "pruned")
    assert [entry["stage"] for entry in report["runs"]] == ["prune", "plan", "verify"]
    assert report["pattern"]["conforms"] is True
    assert len(report["plan"]["layers"]) >= 14
    assert (tmp_path / "pruned" / "recipe.txt").read_text() == recipe
    page = (tmp_path / "pruned" / "report.html").read_text()
    assert "The pattern holds" in page
    assert f"{report['plan']['device']['title']}, tensorrt-llm" in page
    assert not list((tmp_path / "pruned").glob(".*"))

    alone = run("verify", tmp_path / "tiny", "--report", tmp_path / "found")
    assert alone.exit_code == 1
    assert "The pattern does NOT hold" in (tmp_path / "found" / "report.html").read_text()
    assert read_report(tmp_path / "found")["runs"][0]["stage"] == "verify"

    before = sorted((tmp_path / "tiny").iterdir())
    refused = run("verify", tmp_path / "tiny", "--report", tmp_path / "tiny")
    assert refused.exit_code == 2
    assert "holds no report" in refused.stderr
    assert sorted((tmp_path / "tiny").iterdir()) == before
