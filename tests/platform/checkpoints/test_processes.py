"""Two processes save one checkpoint together; one process reads it, and two read it again."""

import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.platform.checkpoints.store import open_store

pytestmark = pytest.mark.slow

WORKER = """
import sys
import jax
folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pathlib import Path
from lamina.platform.checkpoints.store import open_store
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
specs = {"w": P("a", "b"), "v": P("b"), "keys": P("a"), "step": P()}
shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
def make(offset):
    return {"w": jnp.arange(64.0).reshape(8, 8) + offset, "v": jnp.arange(6.0),
            "keys": jax.random.split(jax.random.key(0), 4), "step": jnp.int32(3)}
build = jax.jit(make, out_shardings=shardings)
store = open_store(folder, keep=2)
state = build(0)
form = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
for step in (1, 2, 3):
    assert store.save(step, build(step), {"step": step})
assert not store.save(3, build(3))
store.wait()
assert store.steps() == (2, 3), store.steps()
restored = store.restore(form)
assert restored.step == 3 and restored.extra == {"step": 3} and restored.notes == ()
same = jax.jit(lambda a, b: jnp.array_equal(a, b))
assert bool(same(restored.state["w"], build(3)["w"]))
store.close()
# Damage: both processes must fall back together.
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("before damage")
if index == 0:
    for path in (Path(folder) / "3").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
multihost_utils.sync_global_devices("after damage")
store = open_store(folder, keep=2)
restored = store.restore(form)
assert restored.step == 2 and len(restored.notes) == 1, restored
assert store.save(3, build(4))
store.close()
"""


def test_two_processes_save_and_fall_back_together_and_one_reads_it(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "checkpoints"
    command = [sys.executable, "-c", WORKER, str(folder), str(port)]
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    with logs[0].open("w") as first, logs[1].open("w") as second:
        workers = [
            subprocess.Popen([*command, str(index)], stdout=log, stderr=subprocess.STDOUT)
            for index, log in enumerate((first, second))
        ]
        try:
            codes = [worker.wait(timeout=150) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
    assert codes == [0, 0], [log.read_text() for log in logs]
    store = open_store(folder)
    form = {
        "w": jnp.zeros((8, 8)),
        "v": jnp.zeros(6),
        "keys": jax.random.split(jax.random.key(1), 4),
        "step": jnp.int32(0),
    }
    restored = store.restore(form)
    assert restored.step == 3
    assert restored.notes == ()
    np.testing.assert_array_equal(restored.state["w"], np.arange(64).reshape(8, 8) + 4)
    store.close()
