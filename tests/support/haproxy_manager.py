"""What Ray's manager of HAProxy does, without Ray: `haproxy_manager.py PORT BACKEND_PORT...`, in its environment.

Without a backend's port it knows of no application yet, as one that Ray has just started. Prints the pid of HAProxy
once it runs; for each line on standard input, which names backend ports, it tells HAProxy of these and prints the new
pid. Ends HAProxy at the end of the input.
"""

from __future__ import annotations

import asyncio
import os
import sys

from ray.serve._private.constants import RAY_SERVE_HAPROXY_CONFIG_FILE_LOC, RAY_SERVE_HAPROXY_SOCKET_PATH
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

NODE = "0" * 56


def below_node(path: str) -> str:
    """As the manager does, with the node's id."""
    folder, name = os.path.split(path)
    return os.path.join(folder, NODE, name)


def backends(ports: list[str]) -> dict[str, BackendConfig]:
    """One application with these replicas, and Ray's substitute for them."""
    servers = [ServerConfig(f"replica-{port}", "127.0.0.1", int(port)) for port in ports]
    substitute = ServerConfig("substitute", "127.0.0.1", 1)
    return {"http-divisi": BackendConfig("http-divisi", "/", servers=servers, app_name="divisi",
                                         fallback_server=substitute)}  # fmt: skip


async def main(port: int, replicas: list[str]) -> None:
    socket_path = below_node(RAY_SERVE_HAPROXY_SOCKET_PATH)
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        is_head=True,
        socket_path=socket_path,
        server_state_base=os.path.dirname(socket_path),
        server_state_file=os.path.join(os.path.dirname(socket_path), "server-state"),
    )
    api = HAProxyApi(config, backends(replicas) if replicas else {}, below_node(RAY_SERVE_HAPROXY_CONFIG_FILE_LOC))
    await api.start()
    while True:
        assert api._proc is not None
        print(api._proc.pid, flush=True)
        line = await asyncio.to_thread(sys.stdin.readline)
        if not line:
            break
        api.set_backend_configs(backends(line.split()))
        await api.reload()
    await api.stop()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2:]))
