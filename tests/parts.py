"""The parts of the full tier, and which tests each of them holds: `make verify PART=step`.

A test belongs to the part of its file, or of the nearest folder that the table names, or to the one that it names
itself by `@pytest.mark.part("faults")`. A folder that the table doesn't know is an error, and so is a part.
"""

from __future__ import annotations

from collections.abc import Sequence

PARTS = {
    "chart": "the Helm chart, the wheel, the image, the fetching of models, load balancers and several nodes",
    "clients": "independent clients in each topology",
    "deaths": "gaps of open streams when a process, a node or a network dies, and that nothing is lost or left",
    "dispatch": "rows to the experts and back: every mode and transport, the door of the mesh and of the meeting place",
    "faults": "start, stop and what fails on the way: processes, sockets, files, grammars",
    "kernels": "kernels: every build that runs here, every number of rows, those of GPUs in an interpreter",
    "mtp": "multi-token prediction: the layer, drafts that change nothing, how far they go, killed shards",
    "scale": "attention workers that follow the queue: the policy, its simulation, a server under load; shards, too",
    "serve": "the API, the limits and the command line",
    "step": "what a step computes: model, engine, gang, the comparison of two checkouts",
    "telemetry": "metrics, traces, dashboards and alerts, with a real Prometheus",
}

TABLE = {
    "benchmarks": "step",
    "benchmarks/test_autoscaling.py": "scale",
    "benchmarks/test_dispatch.py": "dispatch",
    "clients": "clients",
    "cluster": "step",
    "cluster/engine/times/test_calibration.py": "mtp",
    "cluster/engine/test_drafting.py": "mtp",
    "cluster/test_drafting.py": "mtp",
    "cluster/step_times": "mtp",
    "cluster/telemetry": "telemetry",
    "cluster/dispatch": "dispatch",
    "cluster/gang/membership/layout/test_balance.py": "scale",
    "cluster/gang/membership/layout/test_rebalancing.py": "scale",
    "cluster/gang/membership/layout/test_rebalancing_histories.py": "scale",
    "cluster/gang/test_refused_demand.py": "scale",
    "contract": "dispatch",
    "deploy": "serve",
    "deploy/api/test_mtp.py": "mtp",
    "deploy/api/test_mtp_model.py": "mtp",
    "deploy/api/test_structured_output.py": "faults",
    "deploy/api/test_tracing.py": "telemetry",
    "deploy/application/test_queue_policy.py": "scale",
    "deploy/monitoring": "telemetry",
    "deploy/prefetch": "chart",
    "deploy/report": "telemetry",
    "distributed": "step",
    "distributed/test_drafting_gang.py": "mtp",
    "distributed/test_expert_policy.py": "scale",
    "distributed/test_micro_batches.py": "dispatch",
    "distributed/test_rebalancing.py": "scale",
    "distributed/test_scaling.py": "scale",
    "e2e": "serve",
    "e2e/chaos": "deaths",
    "e2e/test_autoscaling.py": "scale",
    "e2e/test_copies.py": "scale",
    "e2e/test_scaling.py": "scale",
    "e2e/test_deaths.py": "deaths",
    "e2e/test_deaths_cut.py": "deaths",
    "e2e/test_deaths_owners.py": "deaths",
    "e2e/test_demo.py": "faults",
    "e2e/test_fake_nodes.py": "scale",
    "e2e/test_front.py": "faults",
    "e2e/test_more_workers.py": "deaths",
    "e2e/test_mtp.py": "mtp",
    "e2e/test_own_shm.py": "dispatch",
    "e2e/test_poison.py": "deaths",
    "e2e/test_rolling.py": "deaths",
    "e2e/test_shutdown.py": "faults",
    "e2e/test_telemetry.py": "telemetry",
    "e2e/test_telemetry_overhead.py": "telemetry",
    "k8s": "chart",
    "kernels": "kernels",
    "model": "step",
    "model/layers/test_turns.py": "dispatch",
    "model/sampling/test_coupled.py": "mtp",
    "parity": "step",
    "parity/test_bf16.py": "kernels",
    "parity/test_mtp.py": "mtp",
    "sim": "step",
    "sim/test_drafts_sim.py": "mtp",
    "test_architecture.py": "step",
    "test_parts.py": "step",
    "test_side_by_side.py": "step",
    "test_wheel.py": "chart",
}


def part_of(path: str, named: Sequence[str] = ()) -> str:
    """The part of a test: `path` is its file's below tests/, `named` what its own marks say, the nearest first.

    Raises ValueError where it has none, or one that doesn't exist.
    """
    steps = path.split("/")
    prefixes = ["/".join(steps[:count]) for count in range(len(steps), 0, -1)]
    found = [*named[:1], *(TABLE[prefix] for prefix in prefixes if prefix in TABLE)]
    if not found:
        raise ValueError(f"tests/{path} belongs to no part: add its folder to TABLE in tests/parts.py")
    if found[0] not in PARTS:
        raise ValueError(f"tests/{path} names the part {found[0]!r}; the parts are {', '.join(PARTS)}")
    return found[0]
