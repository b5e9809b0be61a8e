"""How the threads of a command get along with what else the machine is doing."""

from collections.abc import MutableMapping

SPINS = "10000"
"""Looks at a barrier before a thread gives its core away.

libgomp, by which torch computes on Linux, looks 300,000 times. As long as all cores are free that
is quickest. Beside another busy program the thread that is waited for has no core, and the one that
waits keeps its own from it: training mini was measured to get twenty times slower
(``benchmarks/threads.py``). To give the core away at once costs more than half of the speed of
small models on a free machine.
"""


def spin_briefly(environment: MutableMapping[str, str]) -> None:
    """Let threads that wait for one another give way to other programs.

    Args:
        environment: of a process that has not imported torch yet; what the user has set there of
            either kind stays.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = SPINS
