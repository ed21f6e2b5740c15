"""The stages of `benchmarks/gpu.py`, each a generator of rows: ``what``, ``value``, and whether it is as it must be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from speed import measure

import robench
from robench.attacks import ATTACKS
from robench.core.data import Data, load, make
from robench.core.ensemble import Ensemble
from robench.core.fast import Precision, attackable, compiled, has_bfloat16
from robench.core.files import write_text
from robench.core.frozen import full_float32
from robench.core.logs import Lines, logged
from robench.core.models import ModelSpec, build
from robench.core.rng import Draws, Stream
from robench.defenses import DEFENSES
from robench.evaluation import words
from robench.evaluation.outcomes import wilson
from robench.evaluation.settings import Settings
from robench.evaluation.threats import Blackbox, Convergence, Threat, Transfer, Whitebox
from robench.session import Session
from robench.store.importing import import_weights
from robench.store.runs import Run, Runs
from robench.training.batches import batches
from robench.training.compiling import compiled_if_same
from robench.training.loop import check_networks, ensure, make_optimizer, recorded_if_same, train_step
from robench.training.recording import Gradients
from robench.training.task import Task, resolve

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "results/gpu/reference.parquet"
CHECKPOINTS = {
    "baseline-3": "baseline-3-resnet20-seed0.pth",
    "dverge-3": "dverge-3-resnet20-eps0.07-seed0.pth",
    "hold-out": "surrogate-baseline-3-resnet20-jpeg.safetensors",
}
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
#: What identifies a verdict.
PLACE = ["threat", "target", "surrogate", "member", "attack", "loss", "eps", "restart", "sample"]
#: Plug-ins that run in miniature, where others are made ready alone: the way is the same, and tests run each by itself.
FEW = ("baseline", "dverge", "pgd", "square")
#: Share of verdicts that may differ from the CPU's: of images on which rounding decides.
DIFFERING: dict[Precision, float] = {"float32": 0.02, "bfloat16": 0.06}

Row = dict[str, Any]
Rows = Iterator[Row]


@dataclass
class Plan:
    """What a stage is given.

    Attributes:
        seconds: its share of the time, counted from its start.
    """

    data: Path
    out: Path
    device: torch.device
    tiny: bool
    seconds: float
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.began)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


def row(what: str, value: object, ok: bool | None = None) -> Row:
    return {"what": what, "value": str(value), "ok": ok}


def tried(what: str, call: Callable[[], object], limit: int = 30) -> Row:
    """``call`` worked and returned what to say, or raised; one that takes longer than ``limit`` seconds is left."""
    began = time.monotonic()

    def leave(number: int, frame: Any) -> None:
        raise TimeoutError(f"not done after {limit} s")

    signal.signal(signal.SIGALRM, leave)
    signal.alarm(limit)
    try:
        said = call()
    except Exception as error:  # the next one may work
        lines = "".join(traceback.format_exception(error)).strip().splitlines()
        return row(what, " / ".join(line.strip() for line in lines[-9:])[-900:].replace("|", "/"), False)
    finally:
        signal.alarm(0)
    return row(what, f"{said or ''} ({time.monotonic() - began:.1f} s)".strip(), True)


# What it is


def device(plan: Plan) -> Rows:
    if plan.cuda:
        about = torch.cuda.get_device_properties(plan.device)
        yield row("card", f"{about.name}, compute capability {about.major}.{about.minor}")
        yield row("memory", f"{about.total_memory / 2**30:.1f} GiB, {about.multi_processor_count} multiprocessors")
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if shutil.which("nvidia-smi"):
            yield row("driver", subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip())
    else:
        yield row("processor", f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores")
    yield row("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    yield row("computes bfloat16", has_bfloat16(plan.device))
    side = 512 if plan.tiny else 8192 if plan.cuda else 2048
    kinds: dict[str, tuple[torch.dtype, bool]] = {
        "float32": (torch.float32, False),
        "TF32": (torch.float32, True),
        "bfloat16": (torch.bfloat16, False),
    }
    for name, (dtype, shortened) in kinds.items():
        if name == "TF32" and not plan.cuda:
            continue
        matrix = torch.randn(side, side, device=plan.device).to(dtype)
        with full_float32():
            torch.backends.cuda.matmul.fp32_precision = "tf32" if shortened else "ieee"
            taken = min(measure.in_turns({"": partial(torch.mm, matrix, matrix)}, 5, plan.device)[""])
        yield row(f"matrix product, {name}", f"{2 * side**3 / taken / 1e12:.2f} TFLOP/s")
    source = torch.randn(1 << (20 if plan.tiny else 28 if plan.cuda else 25), device=plan.device)
    taken = min(measure.in_turns({"": partial(torch.empty_like(source).copy_, source)}, 5, plan.device)[""])
    yield row("copy", f"{2 * source.nbytes / taken / 1e9:.0f} GB/s")


# Does it work


def works(plan: Plan) -> Rows:
    digits = load("digits")
    few = _few(digits, 96)
    with tempfile.TemporaryDirectory() as folder:
        store = Runs(folder)
        runs: dict[str, Run] = {}

        def trained(defense: str, **more: Any) -> str:
            told: list[str] = []
            task = _small(few, defense)
            if plan.tiny and defense not in FEW:
                return f"{task.name}: made ready alone"
            with logged(Lines(told)):
                runs[defense] = ensure(task, few, store, device=plan.device, **more)
            plain = [text for text in told if "CUDA graphs" in text]
            return "; ".join([f"loss {sum(runs[defense].manifest['history'][-1]['terms'].values()):.3f}", *plain])

        before = _torch_state(plan.device)
        for defense in DEFENSES.names():
            yield tried(f"three steps of {defense}", partial(trained, defense))
        # Attacked is one that has learnt something.
        known = ensure(_small(digits, "baseline", overrides={"epochs": 4}), digits, store, device=plan.device)
        own = ensure(_small(digits, "baseline", role="surrogate", overrides={"epochs": 4}), digits, store,
                     device=plan.device)  # fmt: skip
        images = 8 if plan.tiny else 32
        target = [known]

        def judged(threat: Threat, probe: bool = False, **how: Any) -> str:
            work = Session(Runs(folder), digits, Settings(plan.device, **how), images)
            outcomes = work.judge(target, threat, probe=probe)
            table = outcomes.where(threat=threat.name).accuracy(["eps"])
            return f"accuracy {table['accuracy'].iloc[-1]:.1%}"

        short = (ATTACKS.get("pgd")(steps=3),)
        for name in ATTACKS.names():
            if name.startswith("torchattacks/"):
                continue
            kind = ATTACKS.get(name)
            fewer = {key: 3 for key in ("steps", "queries") if hasattr(kind, key)}

            def crafted(kind: Any = kind, fewer: Any = fewer) -> str:
                attack = kind(**fewer)
                if plan.tiny and attack.name not in FEW:
                    return f"{attack.label}: made ready alone"
                return judged(Whitebox(eps=(0.1,), restarts=1, attacks=(attack,)))

            yield tried(f"attack {name}", crafted)
        yield tried("survivors attacked again", partial(judged, Whitebox(eps=(0.15,), attacks=short), probe=True))
        yield tried("threat transfer", partial(judged, Transfer(eps=(0.1,), restarts=2, attacks=short)))
        attacks = tuple(replace(each, steps=3) for each in words.attacks("blackbox"))  # type: ignore[call-arg]
        work = Session(store, digits, Settings(plan.device), images)
        hold_out = Blackbox(surrogates=(work.load(own),), eps=(0.1,), restarts=2, attacks=attacks)
        yield tried("threat blackbox, ten versions", partial(judged, hold_out))
        yield tried("threat convergence", partial(judged, Convergence(eps=(0.1,), attacks=short)))
        if has_bfloat16(plan.device):
            yield tried(
                "crafting in bfloat16", partial(judged, Whitebox(eps=(0.1,), attacks=short), precision="bfloat16")
            )
        yield row("torch's global state", "as it was", _torch_state(plan.device) == before)
        yield tried("two processes on one device", partial(_two_processes, plan, folder, known.name), 90)
        yield tried("killed and resumed", partial(_killed, plan, Path(folder), few), 90)
        if plan.cuda:
            yield tried("out of memory", partial(_out_of_memory, plan, digits, known))
        if not plan.tiny and (Path(robench.__file__).parents[1] / "tests").is_dir():
            yield tried("tests that need a device", partial(_device_tests, plan), 150)
        # Longest last: a compiler takes half a minute.
        threat = Whitebox(eps=(0.11,), attacks=short, restarts=1 if plan.tiny else 5)
        yield tried("crafting through torch.compile", partial(judged, threat, compile=True), 120)
        told: list[str] = []

        def compiled_training() -> str:
            task = _small(few, "dverge", overrides={"layer": 4, "layer_per": "epoch"})
            with logged(Lines(told)):
                run = ensure(task, few, Runs(Path(folder) / "compiled"), device=plan.device, compile=True)
            assert run.manifest.get("compiled"), "; ".join(told)
            return "same steps"

        yield tried("training through torch.compile", compiled_training, 120)


def _few(data: Data, count: int) -> Data:
    """The first training images; all test images."""
    train, test = data.train, data.test
    return make(
        "npz:few",
        (train.images[:count].numpy(), train.labels[:count].numpy()),
        (test.images.numpy(), test.labels.numpy()),
        recipe="digits",
    )


def _small(data: Data, defense: str, **more: Any) -> Task:
    fields = {"epochs": 1, "batch_size": 32, **more.pop("overrides", {})}
    return resolve(data, defense, 2, models=["resnet8"], init="scratch", overrides=fields, **more)


def _torch_state(device: torch.device) -> list[object]:
    """What of torch's own state a library must leave alone."""
    drawn = [torch.get_rng_state().tolist()]
    if device.type == "cuda":
        drawn.append(torch.cuda.get_rng_state(device).tolist())
    return [
        *drawn,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(),
    ]


def _robench(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "robench", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    )


def _finished(process: subprocess.Popen[str], seconds: float) -> str:
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, said[-400:]
    return said


def _two_processes(plan: Plan, folder: str, name: str) -> str:
    line = f"eval {name} --dataset digits --threat whitebox --eps .12 --samples 24 --steps 5 --workers 2 --no-probe"
    _finished(_robench(*line.split(), "--runs", folder, "--device", str(plan.device)), max(60.0, plan.left))
    return "done"


#: `robench`, with a checkpoint after every step instead of every thirty seconds.
SAVING_OFTEN = "from robench.training import loop; loop.CHECKPOINT_SECONDS = 0; from robench.cli import main; main()"


def _killed(plan: Plan, folder: Path, data: Data) -> str:
    """A training that was killed gives the weights of one that was not, or says how far they are apart."""
    file = folder / "few.npz"
    np.savez(file, x_train=data.train.images.numpy(), y_train=data.train.labels.numpy(),
             x_test=data.test.images.numpy(), y_test=data.test.labels.numpy())  # fmt: skip
    line = f"train baseline --n 2 --model resnet8 --dataset npz:{file} --recipe digits --set batch_size=8 --name both"
    weights, killed = [], False
    for name in ("once", "twice"):
        run = folder / name / "both"
        arguments = [*line.split(), "--epochs", "10", "--runs", str(run.parent), "--device", str(plan.device)]
        if name == "twice":
            process = subprocess.Popen([sys.executable, "-P", "-c", SAVING_OFTEN, *arguments])
            while not (run / "checkpoint.safetensors").exists() and process.poll() is None and plan.left > 30:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed = not (run / "manifest.json").exists()
        _finished(_robench(*arguments), max(60.0, plan.left))
        weights.append(Runs(run.parent).get("both").load().state_dict())
    assert killed, "the training ended before it could be killed"
    apart = max(
        float((one.float() - other.float()).abs().max())
        for one, other in zip(*(each.values() for each in weights), strict=True)
    )
    assert apart < 0.1, f"weights differ by {apart:.2g}"
    return "the same weights" if apart == 0 else f"weights differ by at most {apart:.2g}"


def _out_of_memory(plan: Plan, digits: Data, run: Run) -> str:
    """A batch that does not fit is halved, and the rows are the same."""
    model, told = run.load().to(plan.device), []
    images = np.repeat(digits.test.images.numpy(), 40, axis=0)
    many = make("npz:many", (digits.train.images.numpy(), digits.train.labels.numpy()),
                (images, np.repeat(digits.test.labels.numpy(), 40)), recipe="digits")  # fmt: skip
    threat = Whitebox(eps=(0.1,), restarts=1, attacks=(ATTACKS.get("pgd")(steps=2),))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.02, plan.device)
    try:
        from robench.evaluation.engine import Evaluator
        from robench.evaluation.evaluated import EvaluatedModel

        how = Settings(plan.device, batch_size=len(many.test))
        evaluator = Evaluator(many, how)
        with logged(Lines(told)):
            found = evaluator.run([EvaluatedModel.of_model(model, plan.device)], threat, torch.arange(len(many.test)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, plan.device)
    halved = [text for text in told if "out of memory" in text]
    assert halved, f"no batch was halved; told: {told}"
    return f"{len(halved)} times halved, {len(found.frame)} rows"


def _device_tests(plan: Plan) -> str:
    # Beside the package that is in use: pytest imports what lies there first.
    beside = Path(robench.__file__).parents[1]
    options = ["-q", "-p", "no:cacheprovider", "-k", "not compiler"]  # which rows of their own try, for minutes
    command = [sys.executable, "-m", "pytest", "tests/test_device.py", *options]
    said = subprocess.run(
        command, cwd=beside, capture_output=True, text=True, timeout=max(60.0, plan.left), check=False
    )
    last = (said.stdout.strip().splitlines() or [said.stderr[-300:]])[-1]
    assert said.returncode == 0, said.stdout[-1500:]
    return last


# Is it right


def right(plan: Plan) -> Rows:
    if not (plan.data / "checkpoints").is_dir():
        yield row("published weights", f"not in {plan.data}: left out")
        return
    if not REFERENCE.exists():
        yield row("rows of a CPU", f"{REFERENCE} is missing: python benchmarks/gpu_stages.py reference", False)
        return
    wanted = pd.read_parquet(REFERENCE)
    samples = 4 if plan.tiny else 300
    kinds: list[Precision] = ["float32", "bfloat16"] if has_bfloat16(plan.device) else ["float32"]
    for precision in kinds[: 1 if plan.tiny else 2]:
        with tempfile.TemporaryDirectory() as folder:
            for name, frame, taken in judged(plan, Path(folder), precision, samples):
                yield from _beside(name, frame, wanted, precision, taken)
                if plan.left < 0:
                    yield row(f"{precision} after {name}", "no time left")
                    return


def judged(plan: Plan, folder: Path, precision: Precision, samples: int) -> Iterator[tuple[str, pd.DataFrame, float]]:
    """What of the protocol is compared: rows of a threat, and the seconds that they took."""
    data = load(f"npz:{plan.data / 'cifar10-lossless-subset.npz'}")
    store = Runs(folder)
    runs = {name: _imported(plan.data / "checkpoints" / file, store, name) for name, file in CHECKPOINTS.items()}
    targets = [runs["dverge-3"], runs["baseline-3"]]
    work = Session(store, data, Settings(plan.device, precision), samples)
    tiny: dict[str, Any] = {"attacks": (ATTACKS.get("pgd")(steps=50),)}
    parts: dict[str, Threat] = {
        "whitebox": Whitebox(eps=(0.01, 0.02, 0.03)),
        "transfer": Transfer(eps=(0.03,)),
        "blackbox": Blackbox(surrogates=(work.load(runs["hold-out"]),), eps=(0.03,)),
    }
    if plan.tiny:
        parts = {"whitebox": Whitebox(eps=(0.01,), **tiny)}
    for name, threat in parts.items():
        began = time.monotonic()
        outcomes = work.judge(targets, threat, probe=False)
        yield name, outcomes.where(threat=threat.name).frame, time.monotonic() - began


def _imported(path: Path, store: Runs, name: str) -> Run:
    if name in store.names():
        return store.get(name)
    return import_weights(
        [path],
        store,
        model="resnet20",
        dataset="cifar10",
        defense="dverge" if "dverge" in name else "baseline",
        seed=9001 if name == "hold-out" else 0,
        role="surrogate" if name == "hold-out" else "target",
        name=name,
        parent=None,
        data_folder=Path("data"),
        normalisation=CIFAR if name == "hold-out" else None,
    )


def _beside(name: str, frame: pd.DataFrame, wanted: pd.DataFrame, precision: Precision, taken: float) -> Rows:
    """A threat's rows beside the CPU's, on the images that both have."""
    yield row(f"{name}, {precision}", f"{frame['sample'].nunique()} images in {taken:.1f} s")
    keys = [key for key in PLACE if key in frame and key in wanted and not (key == "restart" and name != "blackbox")]
    both = _places(frame).merge(_places(wanted), on=keys, suffixes=("", " of the CPU"))
    if both.empty:
        yield row(f"{name}, {precision}", "the CPU has no such rows", False)
        return
    by = [key for key in ("target", "eps", *(["surrogate", "member"] if name == "transfer" else [])) if key in both]
    apart, images, limit = [], 0, DIFFERING[precision]
    for place, part in both.groupby(by):
        if name == "blackbox":
            part = part.groupby("sample").agg(
                {"correct": "all", "correct of the CPU": "all", "margin": "min", "margin of the CPU": "min"}
            )
        mine, theirs = part["correct"].astype(bool), part["correct of the CPU"].astype(bool)
        low, high = wilson(int(mine.sum()), len(part))
        share = float((mine != theirs).mean())
        largest = float((part["margin"] - part["margin of the CPU"]).abs().max())
        label = " ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in place)
        said = (
            f"{mine.mean():.1%} [{low:.1%}, {high:.1%}], the CPU {theirs.mean():.1%}; {share:.2%} of verdicts differ, "
            f"margins by at most {largest:.2g}; {len(part)} images"
        )
        # Of few images more may differ by chance.
        yield row(f"{name} {label}, {precision}", said, wilson(round(share * len(part)), len(part))[0] <= limit)
        apart.append(round(share * len(part)))
        images += len(part)
    said = f"{sum(apart)} of {images} verdicts differ, {sum(apart) / images:.2%}"
    yield row(f"{name}, all, {precision}", said, sum(apart) / images <= limit)


def _places(frame: pd.DataFrame) -> pd.DataFrame:
    """Keys in one type; the judged columns beside them."""
    kept = frame[[key for key in PLACE if key in frame]].copy()
    for key in kept:
        kept[key] = kept[key].astype(float).round(6) if key == "eps" else kept[key].astype(str)
    return kept.assign(correct=frame["correct"].to_numpy(), margin=frame["margin"].to_numpy())


def reference(plan: Plan) -> Rows:
    """The CPU's rows, for `right`: hours of two cores; it goes on where it was."""
    folder = plan.out / "reference"
    for samples in (100, 300, 1000):
        found = []
        for name, frame, taken in judged(plan, folder, "float32", samples):
            found.append(frame[[key for key in (*PLACE, "correct", "margin") if key in frame]])
            yield row(name, f"{samples} images in {taken:.0f} s")
            if samples == 100 or name == "blackbox":
                whole = pd.concat(found, ignore_index=True)
                whole["margin"] = whole["margin"].astype("float32")
                whole.to_parquet(plan.out / "reference.parquet", compression="zstd", index=False)


# How fast is crafting


def crafting(plan: Plan) -> Rows:
    data = _photographs(plan)
    ensemble = _networks(plan, data, 3)
    sizes = [16] if plan.tiny else [1000, 128] if plan.cuda else [100]
    steps, rounds = (2, 1) if plan.tiny else (10, 3)
    roof = (
        measure.measure_roof(plan.device) if not plan.tiny else measure.Roof({"float32": 1e10, "bfloat16": 1e10}, 1e10)
    )
    fastest: dict[str, float] = {}
    for size in sizes:
        for part in ("pgd", "mdi2", "sgm"):
            if plan.left < 0:
                yield row("the rest", "no time left")
                return
            size = min(size, len(data.test))
            how = measure.Plan(
                ensemble=ensemble, data=data, device=plan.device, images=size, steps=steps, rounds=rounds
            )
            with full_float32():
                rows = measure.PARTS[part](how, roof)
            for each in rows:
                if each.seconds is None:
                    yield row(f"{part}, {each.variant}, {size} images", each.note)
                    continue
                said = f"{1e3 * each.seconds:.2f} ms a step, {each.ratio:.2f} x the authors' way"
                share = f", {each.roof:.1%} of the roof" if not plan.tiny else ""
                yield row(f"{part}, {each.variant}, {size} images", said + share)
                if each.variant in measure.OURS:
                    key = f"{part} {measure.OURS[each.variant]}"
                    fastest[key] = min(fastest.get(key, float("inf")), each.seconds / size)
    yield from _whitebox(plan, data, ensemble, roof)
    for precision in ("float32", "bfloat16"):
        if f"sgm {precision}" not in fastest:
            continue
        # 1,000 images, 7 radii, 100 steps, two losses; three starts of PGD, one of M-DI² and SGM; 3, 5 and 8 members.
        versions = {"pgd": 3, "mdi2": 1, "sgm": 1}
        whole = sum(2 * count * fastest[f"{name} {precision}"] for name, count in versions.items())
        said = f"{whole * 1000 * 7 * 100 * (3 + 5 + 8) / 3 / 60:.1f} minutes"
        yield row(f"30 versions x 1,000 images x 7 radii on 3, 5 and 8 members, {precision}, projected", said)
    if not plan.tiny:  # a compiler takes longer than all the rest; `works` has tried it
        yield from _compiled_steps(plan, data, ensemble, sizes[0], steps)


def _whitebox(plan: Plan, data: Data, ensemble: Ensemble, roof: measure.Roof) -> Rows:
    """Of networks that were not trained nearly all falls at once: published ones where they are at hand."""
    path = plan.data / "checkpoints" / CHECKPOINTS["dverge-3"]
    with tempfile.TemporaryDirectory() as folder:
        if path.exists() and not plan.tiny:
            ensemble = _imported(path, Runs(folder), "dverge-3").load().eval().to(plan.device)
    fields = {"whitebox_steps": 2, "restarts": 1} if plan.tiny else {}
    images = 4 if plan.tiny else 500 if plan.cuda else 20
    how = measure.Plan(ensemble=ensemble, data=data, device=plan.device, whitebox_images=images, **fields)
    for each in measure.PARTS["whitebox"](how, roof):
        said = f"{each.seconds:.1f} s, {each.ratio:.2f} x the authors' way; {each.note}"
        yield row(f"white-box protocol, {each.variant}", said)


def _compiled_steps(plan: Plan, data: Data, ensemble: Ensemble, size: int, steps: int) -> Rows:
    how = measure.Plan(ensemble=ensemble, data=data, device=plan.device, images=size, steps=steps)
    images, labels = how.batch(size)
    radius, draws = torch.full((size,), how.eps, device=plan.device), Draws.of(range(size))
    attack = ATTACKS.get("pgd")(steps=steps)
    near = images.contiguous(memory_format=torch.channels_last)
    kinds: list[Precision] = ["float32", "bfloat16"] if has_bfloat16(plan.device) else ["float32"]
    for precision in kinds[: 1 if plan.tiny else 2]:
        with full_float32():
            fast, why = compiled(attackable(ensemble, images, precision), images)
            if why:
                yield row(f"pgd through torch.compile, {precision}, {size} images", why, False)
                continue
            call = partial(attack.perturb, fast, near, labels, radius, draws)
            taken = median(measure.in_turns({"": call}, 2, plan.device)[""]) / steps
        yield row(f"pgd through torch.compile, {precision}, {size} images", f"{1e3 * taken:.2f} ms a step")


def _photographs(plan: Plan) -> Data:
    """CIFAR-10 where it is, else noise of its shape: speed does not depend on what is seen."""
    path = plan.data / "cifar10-lossless-subset.npz"
    if path.exists():
        return replace(load(f"npz:{path}"), recipe="cifar10")
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, (2000, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(2000) % 10
    return make("npz:noise", (images[:1000], labels[:1000]), (images[1000:], labels[1000:]), recipe="cifar10")


def _networks(plan: Plan, data: Data, count: int) -> Ensemble:
    spec = ModelSpec(
        name="resnet8" if plan.tiny else "resnet20", num_classes=10, in_channels=3, mean=data.mean, std=data.std
    )
    return Ensemble(build(spec, key) for key in range(count)).eval().to(plan.device)


# How fast is training


#: How a step is done: as it is written, as a CUDA graph, or through torch.compile.
HOWS = ("recorded", "plain", "compiled")


def training(plan: Plan) -> Rows:
    data = _photographs(plan)
    # What takes longest to prepare comes last.
    kinds: list[tuple[Precision, str]] = [
        ("bfloat16", "recorded"),
        ("bfloat16", "plain"),
        ("float32", "recorded"),
        ("float32", "plain"),
        ("bfloat16", "compiled"),
    ]
    kinds = [(precision, how) for precision, how in kinds if plan.cuda or how != "recorded"]
    if not has_bfloat16(plan.device):
        kinds = [("float32", how) for how in HOWS if plan.cuda or how != "recorded"]
    if plan.tiny:
        kinds = [("float32", "plain")]
    layers = [3] if plan.tiny else [1, 10, 19]
    names = ("dverge", "advt", "baseline", "dverge-advt", "adp", "gal")
    waiting = [(n, *kind, name) for n in (3, 5, 8)[: 1 if plan.tiny else 3] for name in names for kind in kinds]
    # A compiler takes half a minute.
    waiting.sort(key=lambda each: each[2] == "compiled")
    for n, precision, how, defense in waiting:
        if plan.left < 0:
            yield row("the rest", "no time left")
            return
        if how == "compiled" and (n > 3 or defense != "dverge"):
            continue
        label = precision if how == "plain" else f"{precision}, {how}"
        own = [0]
        if defense.startswith("dverge"):
            own = layers if defense == "dverge" and n == 3 and how == "recorded" else layers[len(layers) // 2 :][:1]
        taken = []
        for layer in own:
            seconds, said = _step_seconds(plan, data, defense, n, precision, how, layer)
            what = f"{defense}/{n}{f', layer {layer}' if layer else ''}, {label}"
            yield row(what, said, None if seconds else False)
            taken += [seconds] if seconds else []
        if taken:
            mean = sum(taken) / len(taken)
            yield row(
                f"{defense}/{n}, {label}: 200 epochs of 50,000 images, projected",
                f"{mean * 200 * (50_000 // 128) / 3600:.2f} hours; {1e3 * mean:.1f} ms a step",
            )


def _step_seconds(
    plan: Plan, data: Data, defense: str, n: int, precision: Precision, how: str, layer: int
) -> tuple[float, str]:
    """The median step, and what to say of it; 0 where there is none."""
    size = 16 if plan.tiny else 128
    fields: dict[str, Any] = {"batch_size": size, "precision": precision}
    if layer and defense == "dverge":
        fields |= {"layer": layer, "layer_per": "epoch"}
    elif layer and "layer" in DEFENSES.get(defense).__dataclass_fields__:
        fields |= {"layer": layer}
    model = "resnet8" if plan.tiny else "resnet20"
    task = resolve(data, defense, n, models=[model], overrides=fields)
    ensemble = Ensemble(build(spec, key) for key, spec in enumerate(task.members)).to(plan.device)
    check_networks(ensemble, task, data)
    optimizer = make_optimizer(task.recipe, ensemble.train())
    source = batches(data.train.to(plan.device), task.recipe, Stream(("gpu",)), 0, task.defense.paired)
    given = list(islice(source, 4))
    told: list[str] = []

    def step(each: Ensemble, by: torch.optim.Optimizer, number: int, gradients: Gradients | None = None) -> Any:
        return train_step(each, by, task, given[number % len(given)], gradients)

    def measured(gradients: Gradients | None = None) -> tuple[float, str]:
        count = 1 if plan.tiny else 5
        calls = {"": lambda: [step(ensemble, optimizer, number, gradients) for number in range(count)]}
        seconds = median(measure.in_turns(calls, 1 if plan.tiny else 3, plan.device)[""]) / count
        launches = _launches(plan, partial(step, ensemble, optimizer, 0, gradients)) if layer in (0, 10) else ""
        return seconds, f"{1e3 * seconds:.1f} ms a step{launches}"

    with logged(Lines(told)):
        if how == "compiled":
            with compiled_if_same(ensemble, partial(make_optimizer, task.recipe), step, precision) as fast:
                return measured() if fast else (0.0, "; ".join(told))
        if how == "recorded":
            gradients = recorded_if_same(ensemble, task, given, plan.device)
            return measured(gradients) if not told else (0.0, "; ".join(told))
        return measured()


def _launches(plan: Plan, call: Callable[[], object]) -> str:
    """How often a step starts something on the device, in words."""
    if not plan.cuda:
        return ""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize(plan.device)
    counts = {event.key: event.count for event in seen.key_averages()}
    kernels = sum(count for key, count in counts.items() if "LaunchKernel" in key)
    graphs = sum(count for key, count in counts.items() if "GraphLaunch" in key)
    return f", {kernels} kernels launched" + (f" and {graphs} graphs" if graphs else "")


# CIFAR-10 (JPEG), trained here


class TimeIsUp(Exception):
    """A training has had its share; its checkpoint stays."""


def cifar10(plan: Plan) -> Rows:
    archive = plan.data / "cifar10-jpeg75.tar.xz"
    if not archive.exists() and not plan.tiny:
        yield row("images", f"{archive} is missing: left out")
        return

    def progress(done: int, total: int, what: str) -> None:
        if plan.left < 0:
            raise TimeIsUp(f"step {done:,} of {total:,}; the next call goes on")

    with tempfile.TemporaryDirectory() as folder:
        if plan.tiny:
            data, radii, samples = load("digits"), (0.1, 0.2), 8
        else:
            with tarfile.open(archive) as packed:
                packed.extractall(folder, filter="data")
            data, radii, samples = load(f"folder:{_images(Path(folder))}"), (0.01, 0.03), 1000
        # Kept outside the temporary folder: the next call goes on.
        store = Runs(plan.out / "runs")
        for defense in ("baseline", "dverge"):
            told: list[str] = []
            small = {"models": ["resnet8"], "init": "scratch", "overrides": {"epochs": 1}}
            task = resolve(data, defense, 3, **small if plan.tiny else {"recipe": "cifar10-fast"})  # type: ignore[arg-type]
            began = time.monotonic()
            try:
                with logged(Lines(told)):
                    run = ensure(task, data, store, device=plan.device, compile=plan.cuda, progress=progress)
            except TimeIsUp as error:
                yield row(f"{defense}/3", f"{time.monotonic() - began:.0f} s: {error}")
                return
            words = "; ".join(text for text in told if run.name not in text)
            yield row(f"{defense}/3", f"there after {time.monotonic() - began:.0f} s; {words}".strip("; "), True)
            for file in ("weights.safetensors", "manifest.json"):
                shutil.copyfile(run.folder / file, plan.out / f"{defense}-3-{file}")
            short: dict[str, Any] = {"attacks": (ATTACKS.get("pgd")(steps=3),)} if plan.tiny else {}
            threats: list[Threat] = [Whitebox(eps=radii, **short)]
            if not plan.tiny:
                threats.insert(0, Transfer(eps=radii[-1:], **short))
            for threat in threats:
                outcomes = Session(store, data, Settings(plan.device), samples).judge([run], threat)
                table = outcomes.where(member="ensemble").accuracy(["threat", "eps"])
                said = ", ".join(
                    f"{each.threat} {each.eps:g}: {each.accuracy:.1%} [{each.low:.1%}, {each.high:.1%}]"
                    for each in table.itertuples()
                )
                yield row(f"{defense}/3, {threat.name}", said)
                yield from (row(f"{defense}/3, {check.name}", f"{check.status}: {check.said}")
                            for check in outcomes.checks if check.status != "pass")  # fmt: skip


def _images(folder: Path) -> Path:
    """Where the folders of training and test images lie."""
    return next(path.parent for path in sorted(folder.rglob("train")) if (path.parent / "test").is_dir())


STEPS: dict[str, Callable[[Plan], Rows]] = {
    "device": device,
    "works": works,
    "right": right,
    "crafting": crafting,
    "training": training,
    "cifar10": cifar10,
    "reference": reference,
}


def main(name: str, part: Path) -> None:
    """One stage: options as JSON on standard input, rows into ``part`` as they are found."""
    given = json.load(sys.stdin)
    out = Path(given["out"])
    plan = Plan(Path(given["data"]), out, torch.device(given["device"]), given["tiny"], given["seconds"])
    if plan.cuda and plan.device.index is None:
        plan.device = torch.device("cuda", torch.cuda.current_device())
    warnings.simplefilter("ignore", robench.DoubtWarning)
    rows: list[Row] = []
    for found in STEPS[name](plan):
        rows.append(found)
        mark = {True: "yes ", False: "NO  ", None: "    "}[found["ok"]]
        print(f"  {plan.seconds - plan.left:5.0f} s  {mark} {found['what']}: {found['value']}", flush=True)
        write_text(part, json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
