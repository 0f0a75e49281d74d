"""Sweeps over the zoo, each model in a separate process; shared by coverage.py and forms.py."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import Report, start, untimed_parser
from zoo import LIBRARIES, Case, families, quick

import fxlora

Record = dict[str, Any]
Task = tuple[str, str, str]  # library, family, name
# The work on one model (its builder, the device), which writes its findings into the record.
Work = Callable[[Callable[[], Case], str, Record], None]


class Fault(Exception):
    """A failed check."""


# ---- options and records ------------------------------------------------------------------------


def sweep_parser(description: str | None) -> argparse.ArgumentParser:
    parser = untimed_parser(description)
    parser.add_argument("--library", nargs="+", default=list(LIBRARIES), choices=LIBRARIES)
    parser.add_argument("--only", default="", metavar="REGEX", help="match in family/name")
    parser.add_argument("--quick", action="store_true", help="one torchvision model per kind")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per model")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--resume", action="store_true", help="keep the results in --json FILE")
    return parser


def options_given(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = start(parser)
    if options.resume and not options.json:
        parser.error("--resume continues from the results in --json FILE: give --json, too")
    return options


def swept(
    options: argparse.Namespace, work: Work, line: Callable[[Record], str]
) -> tuple[Report, list[Record]]:
    """Return the report and the records of all chosen models, printed and saved as they come."""
    report = Report(options)
    records = resumed(options)
    done = {(r["library"], r["family"], r["name"]) for r in records}
    tasks = [task for task in chosen(options) if task not in done]
    for number, record in enumerate(run_all(work, tasks, options), 1):
        records.append(record)
        report.data["models"] = records
        report.save()
        print(f"[{number}/{len(tasks)}] {line(record)}", flush=True)
    return report, records


def resumed(options: argparse.Namespace) -> list[Record]:
    if not (options.resume and options.json.exists()):
        return []
    return json.loads(options.json.read_text()).get("models", [])


def chosen(options: argparse.Namespace) -> list[Task]:
    return [
        (library, family, name)
        for library in options.library
        for family, models in (quick if options.quick else families)(library).items()
        for name in models
        if re.search(options.only, f"{family}/{name}")
    ]


def empty(task: Task) -> Record:
    keys = ("library", "family", "name")
    return {**dict(zip(keys, task, strict=True)), "passed": [], "failures": [], "seconds": {}}


def add_failures(report: Report, records: list[Record]) -> None:
    failed = [
        {"model": f"{r['library']} {r['name']}", "reason": failure[:200]}
        for r in records
        for failure in r["failures"]
    ]
    if failed:
        report.add("Failures", failed)


def grouped(records: Iterable[Record], key: str) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record[key], []).append(record)
    return groups


def reason(step: str, error: BaseException) -> str:
    """Return one line: the step, the error and, unless it is typed, where it was raised."""
    text = re.sub(r"/\S*site-packages/", "", " ".join(str(error).split()))[:400]
    if isinstance(error, Fault | fxlora.FxLoraError):
        name = "" if isinstance(error, Fault) else f"{type(error).__name__}: "
        return f"{step}: {name}{text}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{step}: {type(error).__name__} at {place}: {text}"


# ---- a process for each model -------------------------------------------------------------------


def in_process(work: Work, task: Task, device: str, threads: int, results: Connection) -> None:
    """Run in the process of one model; the record is sent back even if the work raises."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    library, family, name = task
    record = empty(task)
    begin = time.perf_counter()
    try:
        work(families(library)[family][name], device, record)
    except Exception as error:  # noqa: BLE001 - an error of the zoo is a result, too
        record["failures"].append(reason("zoo", error))
    record["seconds"]["all"] = round(time.perf_counter() - begin, 1)
    results.send(record)


def supervise(work: Work, task: Task, options: argparse.Namespace, context: Any) -> Record:
    """Run one model in a fresh process, which may hang or crash."""
    receiver, sender = context.Pipe(duplex=False)
    arguments = (work, task, options.device, options.threads, sender)
    process = context.Process(target=in_process, args=arguments, daemon=True)
    process.start()
    sender.close()
    record = empty(task)
    try:
        if receiver.poll(options.timeout):
            record = receiver.recv()
        else:
            record["failures"].append(f"process: no result after {options.timeout:g} s")
    except EOFError:
        process.join()
        record["failures"].append(f"process: ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
    return record


def run_all(work: Work, tasks: list[Task], options: argparse.Namespace) -> Iterator[Record]:
    """Yield the records as they come; the fork server has imported the libraries already."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # not inherited before Python 3.12
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *(f"zoo.{name}" for name in options.library)])
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(supervise, work, task, options, context) for task in tasks]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
