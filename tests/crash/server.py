"""A process that has imported everything, and forks one of its kind for each run that ends in a crash.

Started with the preloaded library; reads lines `HOW NAME MOST`, answers each with a line of JSON: `Outcome`.
It never opens a store itself, since no store crosses a fork.
"""

import faulthandler
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from cakefs.store import backup
from tests.crash.cut import Cut, Disk, entries, losses, states, write_state
from tests.crash.damages import DAMAGES
from tests.crash.place import Place
from tests.crash.scenarios import SCENARIOS, Scenario, lend, prepare_base
from tests.crash.shim import Control, mark
from tests.mounts import write_config

STUCK_S = 60
SEED = 8

T = TypeVar("T")


class Outcome(NamedTuple):
    """Attributes:
    total: Of the steps or states that there are.
    failed: Where something did not hold; stderr says what.
    """

    total: int
    failed: list[str]


class Server:
    def __init__(self, endpoint: str, directory: Path, control: Control) -> None:
        self.endpoint = endpoint
        self.directory = directory
        self.control = control
        self.lenders = directory / "lenders"
        self.config = write_config(directory, workers=1)
        self.lost = set[str]()  # of copies of the catalog
        lend(self.lenders)

    def place(self, name: str) -> Place:
        return Place(self.directory / name, self.endpoint, self.lenders, self.config)

    def base(self, name: str) -> Path:
        place = self.place(f"base-{name}")
        if not place.directory.exists():
            place.directory.mkdir()
            self.must(lambda: prepare_base(place, name))
        return place.directory

    def prepared(self, name: str) -> Path:
        """The store on which a scenario begins."""
        place, scenario = self.place(name), SCENARIOS[name]
        shutil.rmtree(place.directory, ignore_errors=True)
        shutil.copytree(self.base(scenario.base), place.directory)
        self.must(lambda: scenario.prepare(place))
        return place.directory

    def kill(self, name: str, most: int) -> Outcome:
        """Runs the scenario once for each of `most` steps, and is killed there."""
        scenario, begin = SCENARIOS[name], self.prepared(name)
        count = self.steps_of(scenario, begin)
        failed = []
        for step in some(list(range(1, count + 1)), most):
            place = self.copy(begin, f"{name}-{step}")
            self.fork(lambda place=place, step=step: self.run(scenario, place, step))  # type: ignore[misc]
            if not self.holds(scenario, place, done=False):
                failed.append(f"{name} killed at step {step} of {count}")
        return Outcome(count, failed)

    def cut(self, name: str, most: int) -> Outcome:
        """Runs the scenario once, and takes the power away: with each thing lost that is not synced yet, and with 0 for
        `most` in many more ways."""
        scenario, begin = SCENARIOS[name], self.prepared(name)
        place, log = self.copy(begin, f"{name}-recorded"), self.directory / f"{name}.log"
        disk, again = Disk(place.directory), Disk(place.directory)
        self.must(lambda: self.record(scenario, place, log))
        record = list(entries(log, place.directory))
        assert len(record) > 1, "the shim recorded nothing"
        found = [cut for cut in losses(disk, record) if not most or self.is_new(cut)]
        if not most:
            found += states(again, record, SEED)
        failed = []
        for number, (entry, done, lost, state) in enumerate(found):
            place = self.place(f"{name}-cut-{number}")
            write_state(state, place.directory)
            if not self.holds(scenario, place, done=done):
                failed.append(
                    f"{name} cut before entry {entry}, state {number}, without {lost or 'what may be absent'}"
                )
        return Outcome(len(found), failed)

    def is_new(self, cut: Cut) -> bool:
        """Commands end with a copy of the catalog: that it is lost under one of them is enough."""
        if not cut.lost.startswith("store/backup"):
            return True
        new = cut.lost not in self.lost
        self.lost.add(cut.lost)
        return new

    def damage(self, name: str, most: int) -> Outcome:
        """Hurts a store in one way, and looks what is served of it and whether it heals; `most` is of no use here."""
        damage = DAMAGES[name]
        place = self.copy(self.base(damage.base), name)
        self.must(lambda: damage.prepare(place))
        damage.hurt(place)
        failed = []
        served = self.fork(lambda: place.check_served(damaged=True))
        if served and not (damage.ends and os.WIFSIGNALED(served)):
            failed.append(f"{name}: what is served")
        if self.fork(lambda: place.heal(damage.heals)):
            failed.append(f"{name}: what is served once it was repaired")
        shutil.rmtree(place.directory)
        return Outcome(1, failed)

    def steps_of(self, scenario: Scenario, begin: Path) -> int:
        place = self.copy(begin, f"{begin.name}-0")
        self.must(lambda: self.run(scenario, place, 1 << 30))
        return self.control.steps

    def copy(self, begin: Path, name: str) -> Place:
        place = self.place(name)
        shutil.copytree(begin, place.directory)
        return place

    def run(self, scenario: Scenario, place: Place, step: int) -> None:
        os.setpgid(0, 0)
        self.control.arm(place.directory, kill_at=step, group=True)
        scenario.act(place)

    def record(self, scenario: Scenario, place: Place, log: Path) -> None:
        self.control.arm(place.directory, log=log)
        scenario.act(place)
        mark("done")

    def holds(self, scenario: Scenario, place: Place, *, done: bool) -> bool:
        good = self.fork(lambda: self.check(scenario, place, done)) == 0
        shutil.rmtree(place.directory)
        return good

    def check(self, scenario: Scenario, place: Place, done: bool) -> None:
        self.control.arm(place.directory)  # Never to die; but nothing here needs a sync.
        place.check_served(damaged=scenario.damaged)
        assert scenario.damaged or place.keeps(scenario.keeps, whole=scenario.base == "pulled")
        assert set(scenario.keeps) <= place.copied()
        assert not done or scenario.done(place)
        assert not done or scenario.base != "empty" or place.names() <= place.copied()
        scenario.act(place)
        assert scenario.done(place)
        place.check_clean()

    def must(self, function: Callable[[], object]) -> None:
        assert self.fork(function) == 0

    def fork(self, function: Callable[[], object]) -> int:
        """Runs it in a process of its own. Returns: how that ended."""
        pid = os.fork()
        if pid:
            status = os.waitpid(pid, 0)[1]
            self.control.disarm()
            return status
        faulthandler.dump_traceback_later(STUCK_S, exit=True)
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


def some(of: Sequence[T], most: int) -> list[T]:
    """So many of them, evenly chosen, the first and the last among them; 0: all."""
    if not 0 < most < len(of):
        return list(of)
    return [of[i * (len(of) - 1) // (most - 1)] for i in range(most)]


def main() -> None:
    endpoint, directory, control = sys.argv[1], Path(sys.argv[2]), Control(Path(sys.argv[3]))
    backup.RATE = 1 << 60  # However soon after the last one, a copy is made.
    server = Server(endpoint, directory, control)
    ways = {"kill": server.kill, "cut": server.cut, "damage": server.damage}
    for line in sys.stdin:
        how, name, most = line.split()
        print(json.dumps(ways[how](name, int(most))), flush=True)


if __name__ == "__main__":
    main()
