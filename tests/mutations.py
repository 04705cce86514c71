"""Changes one line of the mathematics at a time, and checks that the tests detect the change.

    python -m tests.mutations                 all of them, in copies of this tree
    python -m tests.mutations --only NAME     those whose name contains NAME
    python -m tests.mutations --list          their names

A test proves little if it also passes on wrong code. Each entry of the tables in
`tests/mutation_tables` changes one line, and names the tests that must then fail. Every change is
made in a temporary copy of the repository. The exit status is 1 if a mutation survives without a
written reason, or if a mutation cannot be tried.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
COPIED = ("benchmarks", "configs", "kernels_pallas", "sanawm_jax", "tests")
TIMEOUT, BASELINE_TIMEOUT = 300, 1800  # seconds for one mutation's tests, and for all of them once
PASSED, FAILED = 0, 1  # exit statuses of pytest; all others mean that tests could not run


@dataclass(frozen=True)
class Mutation:
    """One changed line.

    Attributes:
      name: name of the change, which begins with its area.
      file: the file to change, from the root of the repository.
      old: exact text, which the file contains once.
      new: the text that replaces it.
      tests: files or tests that must fail, as arguments of pytest.
      survives: the reason why the tests may pass; empty if they must fail.
      jax: the first version of JAX that the tests need.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str = ""
    jax: tuple[int, ...] = ()


def read_tables() -> list[Mutation]:
    """All mutations, in the order of the tables."""
    found = []
    for table in sorted((ROOT / "tests" / "mutation_tables").glob("*.toml")):
        for name, fields in tomllib.loads(table.read_text(encoding="utf-8")).items():
            lists = {key: tuple(v) for key, v in fields.items() if isinstance(v, list)}
            found.append(Mutation(name, **fields | lists))
    return found


def copy_tree(folder: Path) -> Path:
    """Copies all files that the tests need to `folder`."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, folder)
    return folder


def environment(compiled: str) -> dict[str, str]:
    """Returns the environment of the tests. Their runs share a cache of compiled programs."""
    return {
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "1",  # a line may change twice within one tick of a file's clock
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def run_tests(
    tree: Path, tests: tuple[str, ...], compiled: str, timeout: float = TIMEOUT
) -> tuple[int, str]:
    """Runs pytest in a copy until the first failure, and returns its exit status and output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env=environment(compiled),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return -1, f"no end after {timeout} s"
    return done.returncode, done.stdout + done.stderr


def mutate(text: str, mutation: Mutation) -> str:
    """Returns the text of a file with the mutation.

    Raises:
      ValueError: the file does not contain the old text exactly once.
    """
    count = text.count(mutation.old)
    if count != 1:
        raise ValueError(f"{mutation.file} holds {mutation.old!r} {count} times, not once")
    return text.replace(mutation.old, mutation.new)


def try_mutation(mutation: Mutation, tree: Path, compiled: str) -> str:
    """Makes one change, runs its tests, and undoes the change.

    Returns:
      killed, survived, or what kept the tests from running.
    """
    file = tree / mutation.file
    before = file.read_text(encoding="utf-8")
    try:
        file.write_text(mutate(before, mutation), encoding="utf-8")
        status, output = run_tests(tree, mutation.tests, compiled)
    except ValueError as error:
        return str(error)
    finally:
        file.write_text(before, encoding="utf-8")
    if status in (PASSED, FAILED):
        return ("survived", "killed")[status]
    return f"pytest ended with {status}: {output.strip().splitlines()[-1] if output else ''}"


def report(results: dict[Mutation, str]) -> int:
    """Prints a summary and the problems, and returns the exit status."""
    killed = [m for m, result in results.items() if result == "killed"]
    survived = [m for m, result in results.items() if result == "survived"]
    excused = [m for m in survived if m.survives]
    print(f"\n{len(killed)} killed, {len(survived)} survived ({len(excused)} with a reason)")
    for m in excused:
        print(f"  survives: {m.name}; {m.survives}")
    bad = [m for m in results if m not in killed and m not in excused]
    for m in bad:
        print(f"  {results[m].upper()}: {m.name} ({m.file})")
    for m in killed:
        if m.survives:
            print(f"  no reason is needed any more: {m.name}")
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of mutations to try")
    parser.add_argument("--list", action="store_true", help="print the names alone")
    parser.add_argument("--workers", type=int, default=2, help="mutations tried at once")
    parser.add_argument(
        "--trust", action="store_true", help="do not run the tests on the unchanged tree first"
    )
    options = parser.parse_args()
    chosen = [m for m in read_tables() if options.only in m.name]
    if options.list:
        print(*(m.name for m in chosen), sep="\n")
        return 0
    if not chosen:
        print(f"no mutation's name contains {options.only!r}")
        return 2
    too_new = [m for m in chosen if m.jax > jax.__version_info__]
    chosen = [m for m in chosen if m not in too_new]
    for m in too_new:
        print(f"left out: {m.name} needs JAX {'.'.join(map(str, m.jax))}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations_") as folder:
        compiled = str(Path(folder) / "compiled")
        trees: queue.Queue[Path] = queue.Queue()
        for i in range(options.workers):
            trees.put(copy_tree(Path(folder) / f"tree_{i}"))
        if not options.trust:
            tests = tuple(dict.fromkeys(test for m in chosen for test in m.tests))
            status, output = run_tests(trees.queue[0], tests, compiled, BASELINE_TIMEOUT)
            if status != PASSED:
                print(output[-4000:], "the tests fail without any mutation", sep="\n")
                return 2
            print(
                f"the tests pass without a mutation: {time.monotonic() - started:.0f} s", flush=True
            )

        def attempt(mutation: Mutation) -> str:
            tree = trees.get()
            try:
                result = try_mutation(mutation, tree, compiled)
            finally:
                trees.put(tree)
            print(f"{result:<10}{mutation.name}", flush=True)
            return result

        with ThreadPoolExecutor(options.workers) as pool:
            results = dict(zip(chosen, pool.map(attempt, chosen), strict=True))
    print(f"{time.monotonic() - started:.0f} s")
    return report(results)


if __name__ == "__main__":
    sys.exit(main())
