"""The text of a compiled program: its operations, and how often each runs."""

import re
from collections.abc import Iterator

# What libtpu needs in order to compile on a machine without TPUs; set before it is loaded.
WITHOUT_TPUS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Program:
    """What `compiled.as_text()` gives, by computation."""

    def __init__(self, text: str):
        self.computations: dict[str, list[str]] = {}
        lines: list[str] = []
        # The metadata that a kernel was given stands on lines of its own.
        text = re.sub(r"kernel_metadata=\{\n.*?\n\}", "", text, flags=re.DOTALL)
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                lines = self.computations["" if head[1] else head[2]] = []
            else:
                lines.append(line)

    def operations(
        self, computation: str = "", times: int = 1, inside: bool = False
    ) -> Iterator[tuple[int, str]]:
        """(how often it runs, line) of every operation, loops followed.

        inside: also those inside of fusions and asynchronous calls, and of all branches of a
        condition.

        Raises ValueError for a loop whose number of trips cannot be read and, without `inside`,
        for a condition, which has no one cost.
        """
        for line in self.computations[computation]:
            yield times, line
            if " while(" in line:
                often = times * self._trips(line)
                yield from self.operations(_after("body=", line), often, inside)
            elif " call(" in line:
                yield from self.operations(_after("to_apply=", line), times, inside)
            elif inside and (called := re.search(r" calls=%?([\w.\-]+)", line)):
                yield from self.operations(called[1], times, inside)
            elif " conditional(" in line:
                if not inside:
                    raise ValueError(f"a condition has no one cost: {line.strip()}")
                for branch in _branches(line):
                    yield from self.operations(branch, times, inside)

    def _trips(self, line: str) -> int:
        """How often a loop that counts up to a constant runs."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
            return int(known[1])
        text = "\n".join(self.computations[_after("condition=", line)])
        limits = re.findall(r"[su]32\[\]\S* constant\((\d+)\)", text)
        if len(limits) != 1 or "direction=LT" not in text:
            raise ValueError(f"the number of trips of a loop is unknown: {line.strip()}\n{text}")
        return int(limits[0])


def _after(word: str, line: str) -> str:
    """The computation that is named behind a word."""
    return line.partition(word)[2].lstrip("%").split(",")[0].split(" ")[0].rstrip(")")


def _branches(line: str) -> list[str]:
    """The computations of a condition."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", line)
    if listed:
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return [_after(f"{side}_computation=", line) for side in ("true", "false")]
