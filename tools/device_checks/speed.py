"""How fast and how large: waits for the host, the whole detector, its decoder alone, and where a step's time goes."""

import json
import time
from collections import defaultdict
from statistics import median

import torch
from analysis_tools.decoder_benchmark.case import PASSES, Case, products
from torch.autograd import DeviceType

from mmdet_lors.engine.machine import peak_resident
from mmdet_lors.errors import first_line

from .check import Machine, Sheet, Skipped, name_of
from .runs import Runs
from .waits import counted

BF16 = torch.bfloat16


def short(x: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def best_sampling(machine: Machine, amp: torch.dtype | None) -> str:
    """The back end that section 3 found fastest, or what the decoder chooses."""
    return machine.figure("sampling", "fastest", {}).get(name_of(amp), "auto")


def size(machine: Machine) -> tuple[int, int]:
    """(W, H) of an image of 800 x 1333, padded."""
    return (64, 64) if machine.tiny else (1344, 800)


def waits(machine: Machine, sheet: Sheet) -> None:
    """Section 6: a step waits once, in the matching, also with data and hooks; inference does not wait at all."""
    if not machine.cuda:
        raise Skipped("a CPU does not wait")
    rows, steps = sheet.table("", "waits per iteration", "of them", "where"), 3
    for name, work, most in (("LORS", "step", 1), ("plain 2x64", "inference", 0), ("LORS", "inference", 0),
                             ("LORS, served folded", "inference", 0)):  # fmt: skip
        case = Case(name, work, 100, 2, (480, 320), "detector", str(machine.device), amp=BF16,
                    sampling=best_sampling(machine, BF16))  # fmt: skip
        case()
        case()
        with counted() as found:
            for _ in range(steps):
                case.run()
        rows += tell(sheet, f"{name}, {work}", found, steps, most)
    runs = Runs(machine, "waits")
    file = machine.work / "waits.json"
    hook = dict(type="CountWaitsHook", file=str(file), first=10, last=20)
    process = runs.train("work", runs.config(hook, epochs=6, logged=1000, saved=1000, trace=False))
    status = process.finish(machine.left())
    if status or not file.is_file():
        sheet.fail(f"the run ended with exit status {status}: {process.last_line()}")
    else:
        rows += tell(sheet, "tools/train.py, with data and hooks", json.loads(file.read_text()), 10, 1)


def tell(sheet: Sheet, what: str, found: dict[str, int], steps: int, most: int) -> list[list[str]]:
    """Rows of one work; fails if there are more waits than allowed."""
    per = sum(found.values()) / steps
    sheet.figures[what] = dict(per_iteration=per, places=dict(found))
    sheet.note += f"{', ' if sheet.note else ''}{what}: {per:g}"
    places = sorted(found.items(), key=lambda item: -item[1])
    if per > most:
        sheet.fail(f"{what}: {per:g} waits per iteration, at most {most}; {', '.join(p for p, _ in places[:6])}")
    rows = [[what, f"{per:g}", "", ""]]
    return rows + [["", "", f"{count / steps:g}", place] for place, count in places]


def combinations(machine: Machine) -> list[tuple]:
    """(variant, work, batch, queries, autocast, how), the most telling first.

    How: 'compiled', the decoder's stages; 'channels last', the images; or neither.
    """
    trained = ["LORS", "plain 2x64", "plain 4x32"]
    served = ["LORS, served folded", "LORS", "plain 2x64"]
    if machine.tiny:
        return [
            ("LORS", "step", 2, 4, None, ""), ("LORS, served folded", "inference", 2, 4, None, ""),
            ("naive LORS", "step", 2, 4, None, ""), ("LORS", "inference", 2, 4, None, "compiled"),
            ("LORS", "step", 2, 4, BF16, "channels last"),
        ]  # fmt: skip

    def group(batch, queries, amp, naive=()) -> list[tuple]:
        works = [*((v, "step") for v in trained), *((v, "inference") for v in served)]
        works += [(v, work) for v in naive for work in ("step", "inference")]
        return [(*work, batch, queries, amp, "") for work in works]

    naive = ("naive LORS", "naive plain 2x64")
    return [
        *group(16, 300, BF16), ("naive LORS", "step", 16, 300, BF16, ""),
        ("LORS", "step", 16, 300, BF16, "channels last"), *group(2, 300, BF16, naive), *group(16, 300, None),
        ("LORS", "step", 16, 300, BF16, "compiled"), ("LORS, served folded", "inference", 16, 300, BF16, "compiled"),
        *group(16, 100, BF16), *group(2, 300, None, naive), ("LORS", "step", 2, 300, BF16, "compiled"),
        *group(2, 100, BF16, naive), *group(16, 100, None), *group(2, 100, None, naive),
    ]  # fmt: skip


def speed(machine: Machine, sheet: Sheet) -> None:
    """Section 7: images per second and peak memory of the whole R50 detector."""
    results = sheet.figures
    width, height = size(machine)
    sheet.parts.append(
        f"R50, {height} x {width} pixels; a step is forward, backward and AdamW; peak is of allocated memory. "
        f"TF32 in convolutions: {torch.backends.cudnn.allow_tf32}; in products: "
        f"{torch.backends.cuda.matmul.allow_tf32} (PyTorch's defaults). Median of at most 10, after 3."
    )
    rows = sheet.table("variant", "work", "batch", "queries", "precision", "sampling", "images/s", "ms", "peak, GB")
    # What comes next may take as long as what took longest; six stages, twice as long to compile as three.
    slowest, compilation = 0.0, 2 * machine.figure("compile", "first step", 20.0)
    for row in combinations(machine):
        name, work, batch, queries, amp, how = row
        label = [name, work, str(batch), str(queries), name_of(amp) + (f", {how}" if how else "")]
        compiled = how == "compiled"
        begin = time.monotonic()
        if machine.left() < (3 if machine.tiny else slowest + compiled * compilation):
            found = dict(result="not run")
        else:
            found = speed_of(machine, *row)
            slowest = max(slowest, 0 if compiled else time.monotonic() - begin)
        if found["result"].startswith("failed"):
            sheet.fail(f"{', '.join(label)}: {found['result']}")
        results[", ".join(label)] = found
        told = [short(found[key]) if key in found else "" for key in ("images/s", "ms", "peak GB")]
        rows.append([*label, found.get("sampling", ""), *(told if "ms" in found else [found["result"], "", ""])])
        machine.save()
    timed = {label: found for label, found in results.items() if "ms" in found}
    first = next(iter(timed), "")
    sheet.note = f"{len(timed)} of {len(results)} timed"
    if first:
        sheet.note += f"; {first}: {timed[first]['images/s']:.3g} images/s, {timed[first]['peak GB']:.3g} GB"


def speed_of(
    machine: Machine, name: str, work: str, batch: int, queries: int, amp: torch.dtype | None, how: str = "",
    level: str = "detector",
) -> dict:  # fmt: skip
    """One row: 'result' ('timed', 'out of memory' or 'failed: ...') and its figures."""
    backend = best_sampling(machine, amp)
    found = dict(result="timed", sampling="grid_sample" if name.startswith("naive") else backend)
    compiled = how == "compiled"
    compile = dict(backend="aot_eager") if compiled and machine.tiny else compiled
    stages = 2 if machine.tiny and level == "detector" else 6
    case = None
    if machine.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        case = Case(name, work, queries, batch, size(machine), level, str(machine.device), amp=amp, compile=compile,
                    sampling=backend, stages=stages)  # fmt: skip
        if how == "channels last":
            case.model.channels_last = True
        begin = time.perf_counter()
        case()
        found["first, s"] = time.perf_counter() - begin
        turns = dict(turns=1, warm_up=0) if machine.tiny else dict(turns=10, warm_up=2, most=4.0)
        taken = machine.median_time(case.run, **turns)
        peak = torch.cuda.max_memory_allocated() if machine.cuda else peak_resident()
        found |= {"ms": 1e3 * taken, "images/s": batch / taken, "peak GB": peak / 1e9}
    except torch.OutOfMemoryError:
        found["result"] = "out of memory"
    except Exception as error:
        found["result"] = f"failed: {type(error).__name__}: {first_line(error)}"
    del case
    if compiled:
        torch.compiler.reset()
    return found


def matrix_rate(machine: Machine, sheet: Sheet) -> None:
    """Section 8: the decoder's products over its time, as a share of the card's matrix product."""
    batch, queries = (1, 4) if machine.tiny else (16, 300)
    width, height = size(machine)
    sheet.parts.append(
        f"The decoder alone on random levels, batch {batch}, {queries} queries. Operations: 2 for every multiply-add "
        "of the products of a plain decoder with the same groups and points, times 3 for forward + backward."
    )
    rows = sheet.table("variant", "work", "precision", "ms", "TFLOP/s", "of the 8192 product's")
    for name in ("LORS", "plain 2x64", "naive LORS")[: 1 if machine.tiny else 3]:
        operations = 2 * products(name, queries, (width, height))
        for amp in (BF16, None):
            rate = machine.figure("environment", f"matrix {name_of(amp)}")
            for work, passes in PASSES.items():
                if machine.left() < 3:
                    rows.append([name, work, name_of(amp), "not run", "", ""])
                    continue
                variant = "LORS, served folded" if name == "LORS" and work == "inference" else name
                found = speed_of(machine, variant, work, batch, queries, amp, level="decoder")
                if "ms" not in found:
                    rows.append([variant, work, name_of(amp), found["result"], "", ""])
                    continue
                done = operations * passes * batch / found["ms"] * 1e3
                share = done / rate if rate else float("nan")
                sheet.figures[f"{variant}, {work}, {name_of(amp)}"] = dict(
                    found, operations_per_second=done, share=share
                )
                rows.append(
                    [variant, work, name_of(amp), short(found["ms"]), f"{done / 1e12:.3g}", f"{100 * share:.1f} %"]
                )
                sheet.note = (
                    sheet.note or f"{variant}, {work}, {name_of(amp)}: {100 * share:.1f} % of the matrix product"
                )


def profile(machine: Machine, sheet: Sheet) -> None:
    """Section 9: the kernels of training steps."""
    if not machine.cuda:
        raise Skipped("a CPU launches no kernels")
    steps = 3
    case = Case("LORS", "step", 300, 16, size(machine), "detector", str(machine.device), amp=BF16,
                sampling=best_sampling(machine, BF16))  # fmt: skip
    wall = median([case() for _ in range(5)][2:])
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            case()
    spent, count = defaultdict(float), defaultdict(int)
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            spent[event.name] += event.time_range.elapsed_us() / 1e3 / steps
            count[event.name] += 1
    if not spent:
        sheet.fail("the profiler recorded no kernels")
        return
    busy, launches = sum(spent.values()), sum(count.values()) / steps
    sheet.figures.update(wall_ms=1e3 * wall, busy_ms=busy, launches=launches, kernels=dict(spent))
    sheet.note = f"{launches:.0f} launches a step, GPU busy {100 * busy / wall / 1e3:.0f} % of {1e3 * wall:.0f} ms"
    sheet.parts.append(f"LORS, R50, batch 16, 300 queries, bfloat16: {sheet.note}.")
    largest = sorted(spent, key=spent.get, reverse=True)[:25]
    rows = sheet.table("kernel", "launches a step", "ms a step", "share")
    for kernel in largest:
        shown, share = kernel[:110].replace("|", "/"), spent[kernel] / busy
        rows.append([f"`{shown}`", f"{count[kernel] / steps:.0f}", f"{spent[kernel]:.2f}", f"{100 * share:.1f} %"])
