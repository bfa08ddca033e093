"""Measures the speed of the package on this machine.

    python -m benchmarks.run --suite layer,inference,train,data
    python -m benchmarks.run --suite inference,train --against torch
    python -m benchmarks.run --suite inference --check runs/benchmarks/BEFORE.json

It prints a table for each case. After each case, it writes all measurements and their
conditions to one JSON file. The variants of a case take turns, each in its own process.
The suites `growth` and `inference` together also plot how the time grows with pixels,
batch size and hole ratio. The suite `profile` times the parts of the network and of a
training step; the suite `decoder`, forms of the decoder's convolutions. The suite
`start` times whole commands, from the start of Python. On CPUs, the suite `large` has
the cases of `inference` and `train` that take many minutes.

With `--check`, the command names what became slower than in an earlier report by more
than its spread, and then exits with 1.
"""

import argparse
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import cases, check, timing
from pconv_jax import _files


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = _parse(argv)
    # A time limit from outside then leaves the results and no processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("benchmarks.run: stopped."))
    stored = arguments.check and _read_report(arguments.check)
    if arguments.against == "torch":
        _check_torch(arguments.torch_python)
    # The variants of a case share the memory of the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    session = _Session(arguments)
    report = session.report
    options = {"torch": arguments.against == "torch", "smoke": arguments.smoke}
    # Only the processes know the platform; the first one reports it.
    for case in cases.matmul(platform="cpu", **options):
        session.run(case)
    device = report["machine"].get("platform", "cpu")
    if device != "cpu":
        for case in cases.matmul(platform=device, **options):
            session.run(case)
    for suite in arguments.suite:
        for case in cases.make(suite, platform=device, **options):
            if re.search(arguments.only, case.name):
                session.run(case)
    if "growth" in arguments.suite:
        from benchmarks import plot  # It needs matplotlib, unlike the other suites.

        _files.write_bytes(arguments.out.with_suffix(".svg"), plot.plot_growth(report))
    print(f"\nWritten to {arguments.out}.")
    if stored:
        _check(report, stored)


class _Session:
    """Measures cases, and writes the report after each.

    Attributes:
      report: All measurements so far, and their conditions.
    """

    def __init__(self, arguments: argparse.Namespace):
        self._arguments = arguments
        self._start = time.monotonic()
        others = ("out", "suite", "check")
        settings = {k: v for k, v in vars(arguments).items() if k not in others}
        settings |= {"torch_python": None, "threads": _thread_settings()}
        now = datetime.datetime.now(datetime.UTC)
        self.report: dict[str, Any] = {
            "date": now.isoformat(timespec="seconds"),
            "machine": _describe_machine(),
            "versions": {"python": platform.python_version()},
            "commit": _commit(),
            "suites": arguments.suite,
            "settings": settings,
            "matrix_product_flops_per_s": {},
            "cases": [],
        }

    def run(self, case: cases.Case) -> None:
        """Measure the chosen variants of a case, if it has any and there is time."""
        chosen = {n: v for n, v in case.variants.items() if self._is_chosen(case, n)}
        if not chosen:
            return
        case = case._replace(variants=chosen)
        entry = {"suite": case.suite, "case": case.name}
        entry |= {"items": case.items, "flops": case.flops, "settings": case.variants}
        self.report["cases"].append(entry)
        limit = self._arguments.limit
        if limit and time.monotonic() - self._start > limit:
            entry["skipped"] = f"the limit of {limit:g} s was reached"
            print(f"\n{case.suite}: {case.name}: skipped, {entry['skipped']}")
        else:
            self._measure(case, entry)
        _write(self._arguments.out, self.report)

    def _is_chosen(self, case: cases.Case, name: str) -> bool:
        if re.search(self._arguments.variants, name):
            return True
        # These report the platform.
        return case.suite == "machine" and case.variants[name]["framework"] == "jax"

    def _measure(self, case: cases.Case, entry: dict[str, Any]) -> None:
        arguments, results = self._arguments, {}
        entry |= {"load_average": os.getloadavg()[0], "results": results}
        try:
            timing.compare(
                case,
                results,
                pythons={"jax": sys.executable, "torch": arguments.torch_python},
                rounds=arguments.rounds,
                seconds=arguments.seconds,
                timeout=arguments.timeout,
                jobs=arguments.jobs,
            )
        finally:  # Results are kept when the command is stopped.
            rates = self.report["matrix_product_flops_per_s"]
            timing.summarize(case, results, rates)
            _note_conditions(self.report, entry)
            _write(arguments.out, self.report)
        print(_format(case, results), flush=True)
        busiest = max((r.get("others") or 0 for r in results.values()), default=0)
        if busiest > 0.05:
            print(f"Other processes took up to {busiest:.0%} of the cores.")


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
        dict(report["machine"])
        check.find_slower(report, report)  # Raises if something is missing.
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        sys.exit(f"benchmarks.run: --check: {path} is no report: {error!r}.")
    return report


def _check(report: dict[str, Any], stored: dict[str, Any]) -> None:
    """Exit with 1 if something is slower than in a stored report."""
    for name in ("cpu", "cores"):
        ours, theirs = report["machine"].get(name), stored["machine"].get(name)
        if ours != theirs:
            print(f"Another machine was stored: {name} {theirs} instead of {ours}.")
    slower, compared = check.find_slower(report, stored)
    if not compared:
        sys.exit("benchmarks.run: --check: there is nothing to compare.")
    if slower:
        sys.exit("\n".join([f"{len(slower)} of {compared} are slower:", *slower]))
    print(f"None of {compared} is slower by more than its spread.")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--suite",
        default="layer,inference,train,data",
        type=_suites,
        help=f"suites: {', '.join(cases.SUITES)} (default: %(default)s)",
    )
    add("--against", choices=["torch"], help="also measure this framework")
    add(
        "--torch-python",
        default=sys.executable,
        metavar="PATH",
        help="Python interpreter that has PyTorch (default: this one)",
    )
    add("--only", default="", type=_regex, help="pattern of the names of cases to run")
    add("--variants", default="", type=_regex, help="the same for variants")
    add("--rounds", default=4, type=int, help="turns of each variant (default: 4)")
    add("--seconds", default=2.0, type=float, help="seconds of a turn (default: 2)")
    add(
        "--timeout",
        default=300.0,
        type=float,
        help="seconds that compilation or a turn may take (default: 300)",
    )
    add(
        "--jobs",
        default=1,
        type=int,
        help="processes that start, and compile, at the same time; more than 1 saves "
        "minutes where there are many cores and the work is a GPU's (default: 1)",
    )
    add(
        "--limit",
        type=float,
        help="start no case after this many seconds (default: no limit)",
    )
    add(
        "--check",
        type=Path,
        metavar="FILE",
        help="compare with this report of an earlier run, and exit with 1 if something "
        "is slower",
    )
    add("--smoke", action="store_true", help="use tiny sizes, to test the command")
    add(
        "--out",
        type=Path,
        help="JSON file to write (default: runs/benchmarks/DATE-TIME.json)",
    )
    arguments = parser.parse_args(argv)
    for name in ("rounds", "jobs"):
        if (value := getattr(arguments, name)) < 1:
            parser.error(f"--{name} must be positive, got {value}.")
    if arguments.out is None:
        now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
        arguments.out = Path("runs/benchmarks") / f"{now}.json"
    return arguments


def _suites(text: str) -> list[str]:
    suites = text.split(",")
    for suite in suites:
        if suite not in cases.SUITES:
            known = ", ".join(cases.SUITES)
            raise argparse.ArgumentTypeError(
                f"unknown suite {suite!r}; the suites are {known}"
            )
    return suites


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a valid pattern: {error}"
        ) from None
    return text


def _check_torch(python: str) -> None:
    try:
        subprocess.run([python, "-c", "import torch"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        sys.exit(
            f"benchmarks.run: {python} has no PyTorch. Install torch, onnx and "
            "onnxruntime, or set --torch-python to another interpreter."
        )


def _describe_machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    memory = None
    if sys.platform == "linux":
        text = Path("/proc/cpuinfo").read_text()
        model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        cpu = model.group(1) if model else cpu
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return {
        "cpu": cpu,
        "cores": cores,
        "memory_bytes": memory,
        "system": platform.platform(),
    }


def _thread_settings() -> dict[str, str]:
    names = (
        "XLA_FLAGS",
        "XLA_PYTHON_CLIENT_PREALLOCATE",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
    )
    return {name: os.environ[name] for name in names if name in os.environ}


def _commit() -> str | None:
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    root = Path(__file__).parent
    try:
        done = subprocess.run(git, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _note_conditions(report: dict[str, Any], entry: dict[str, Any]) -> None:
    """Move the conditions that the processes report to the top of the report."""
    for name, result in entry["results"].items():
        report["versions"] |= result.pop("versions", {})
        if "error" in result:
            continue
        if name.startswith("jax"):
            report["machine"] |= {k: result[k] for k in ("platform", "device")}
        if entry["suite"] == "machine":
            dtype = name.split()[1]
            rates = report["matrix_product_flops_per_s"]
            rates[dtype] = max(rates.get(dtype, 0), result["flops_per_s"])


def _format(case: cases.Case, results: dict[str, Any]) -> str:
    """Format the table of a case."""
    width = max(len(name) for name in results)
    first = next(iter(case.variants))
    kind = case.items[1]
    lines = [
        f"\n{case.suite}: {case.name}",
        f"{'':{width}} {'ms':>9} {'quartiles':>17} {'CPU ms':>9} {kind + '/s':>9} "
        f"{'GFLOP/s':>8} {'share':>6} {'compile':>8} {'memory':>8}  x {first}",
    ]
    for name in (n for n in case.variants if n in results):
        r = results[name]
        if "error" in r:
            lines.append(f"{name:{width}} not measured: {r['error']}")
            continue
        low, high = (f"{1e3 * t:.4g}" for t in r["quartiles_s"])
        rate, share = r.get("flops_per_s"), r.get("share_of_matrix_product_rate")
        compile_s, relative = r["compile_s"], r.get("relative")
        memory = r["device_bytes"] or r["running_bytes"]
        cells = [
            f"{name:{width}}",
            f"{1e3 * r['median_s']:9.4g}",
            f"{f'{low} - {high}':>17}",
            f"{1e3 * r['cpu_median_s']:9.4g}",
            f"{r[f'{kind}_per_s']:9.4g}",
            f"{rate / 1e9:8.1f}" if rate else " " * 8,
            f"{share:6.0%}" if share else " " * 6,
            f"{compile_s:6.1f} s" if compile_s else " " * 8,
            f"{memory / 1e6:5.0f} MB",
        ]
        if relative:
            spread = f"({relative['least']:.2f} - {relative['most']:.2f})"
            cpu = f"CPU {r['cpu_relative']['median']:.2f}"
            cells.append(f" {relative['median']:.2f} {spread}, {cpu}")
        lines.append(" ".join(cells))
    return "\n".join(lines)


def _write(path: Path, report: dict[str, Any]) -> None:
    _files.write_bytes(path, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
