"""For the processes of a server under test, which find it by PYTHONPATH: a prompt that kills an expert shard.

Whenever an attention worker computes a step with it, a shard of its server dies in the step's second layer. Every death
is a line in the file that DIVISI_TEST_DEATHS names.
"""

import importlib.abc
import importlib.util
import os
import signal
import sys

POISON = (7, 7, 8)
"""How the prompt begins."""
_MARK = "DIVISI_TEST_CLUSTER"
_ENGINE = "divisi.cluster.engine.engine"


class _Hook(importlib.abc.MetaPathFinder):
    """Changes the engine's class once it is loaded, in the few processes that load it."""

    def find_spec(self, name, path, target=None):
        if name != _ENGINE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_poison(module):
            load(module)
            _poison(module.Engine)

        spec.loader.exec_module = load_and_poison
        return spec


class _Deadly:
    """A dispatcher whose second layer costs a shard its life."""

    def __init__(self, dispatcher):
        self._dispatcher, self._layers = dispatcher, 0

    def __getattr__(self, name):
        return getattr(self._dispatcher, name)

    def dispatch(self, *arguments):
        self._layers += 1
        if self._layers == 2:
            _kill_a_shard()
        return self._dispatcher.dispatch(*arguments)


def _poison(engine):
    run_pass = engine.run_pass

    def poisoned(self, plan, index, dispatcher):
        runs = getattr(plan, "runs", ())
        if any(run.sequence.request.prompt[: len(POISON)] == POISON for run in runs):
            dispatcher = _Deadly(dispatcher)
        return run_pass(self, plan, index, dispatcher)

    engine.run_pass = poisoned


def _kill_a_shard():
    import psutil

    for process in psutil.process_iter(["environ", "cmdline", "name"]):
        own = (process.info["environ"] or {}).get(_MARK) == os.environ[_MARK]
        if own and process.info["name"].startswith("expert:"):
            os.kill(process.pid, signal.SIGKILL)
            with open(os.environ["DIVISI_TEST_DEATHS"], "a", encoding="utf-8") as deaths:
                deaths.write(f"{process.pid}\n")
            return


sys.meta_path.insert(0, _Hook())
