"""Meshes and shardings; on eight virtual devices in a process of its own."""

import os
import subprocess
import sys

import jax
import pytest

from memjax import sharding
from memjax.errors import UserError

EIGHT = """
import jax, jax.numpy as jnp, numpy as np, flax.linen as nn, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from memjax import sharding
from memjax.errors import UserError

assert len(jax.devices()) == 8

def refused(sizes, text):
    try:
        sharding.mesh(sizes)
    except UserError as err:
        assert text in str(err), err
    else:
        raise AssertionError(sizes)

def sizes(*args, **given):
    return tuple(sharding.mesh(given, *args).shape.values())

assert sharding.mesh({'fsdp': 8}).axis_names == ('replica', 'data', 'fsdp', 'context', 'tensor')
assert sizes(data=1, fsdp=-1) == (1, 1, 8, 1, 1)
assert sizes(data=-1, fsdp=2) == (1, 4, 2, 1, 1)
assert sizes(replica=2, fsdp=-1, tensor=2) == (2, 1, 2, 1, 2)
assert sizes(jax.devices()[:2], data=2) == (1, 2, 1, 1, 1)
refused(dict(data=3, fsdp=-1), 'config.mesh=dict(data=3, fsdp=-1): the fixed sizes make 3, there '
        'are 8 devices; choose sizes that divide 8.')
refused(dict(data=2, fsdp=2), 'choose sizes whose product is 8, or set one to -1.')

mesh = sharding.mesh(dict(data=2, fsdp=4))
assert set(mesh.axis_types) == {AxisType.Auto}

def dense(names, shape):
    return nn.with_logical_partitioning(nn.initializers.normal(), names), shape

class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        kernel = self.param('kernel', *dense(('embed', 'heads', 'head_dim'), (16, 2, 8)))
        out = self.param('out', *dense(('heads', 'head_dim', 'embed'), (2, 8, 16)))
        odd = self.param('odd', *dense(('embed', 'mlp'), (6, 3)))
        plain = self.param('plain', nn.initializers.ones, (16,))
        y = jnp.einsum('bd,dhk->bhk', x, kernel)
        return x * plain + jnp.einsum('bhk,hkd->bd', y, out) + odd.sum(), None

class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        table = self.param('embedding', *dense(('vocab', 'embed'), (32, 16)))
        stack = nn.scan(Layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=3,
                        metadata_params={nn.PARTITION_NAME: 'layers'})
        return stack(name='stack')(table[x], None)[0]

model, tokens = Model(), jnp.zeros((8,), jnp.int32)
init = lambda key: model.init(key, tokens)['params']
abstract = jax.eval_shape(init, jax.random.key(0))
placed = sharding.shardings(abstract, mesh)
specs = jax.tree.map(lambda s: tuple(s.spec), placed)
trim = lambda spec: tuple(spec)[:max((i + 1 for i, a in enumerate(spec) if a), default=0)]
assert trim(specs['embedding']) == (None, 'fsdp'), specs
assert trim(specs['stack']['kernel']) == (None, 'fsdp'), specs
assert trim(specs['stack']['out']) == (None, None, None, 'fsdp'), specs
assert trim(specs['stack']['odd']) == trim(specs['stack']['plain']) == (), specs   # 6 % 4

optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
unboxed = lambda key: nn.meta.unbox(init(key))
shapes = jax.eval_shape(unboxed, jax.random.key(0))
moments = sharding.optimizer_shardings(optimizer, jax.eval_shape(optimizer.init, shapes), placed,
                                       mesh)
assert moments[1][0].mu['embedding'] == placed['embedding']
assert moments[1][0].count == sharding.replicated(mesh)

make = lambda key: (lambda p: (p, optimizer.init(p)))(unboxed(key))
params, opt_state = jax.jit(make, out_shardings=(placed, moments))(jax.random.key(0))
assert params['embedding'].sharding.shard_shape((32, 16)) == (32, 4)
rows = sharding.batch_sharding(mesh, 16)
batch = jax.device_put(np.arange(16, dtype=np.int32), rows)
assert rows.shard_shape((16, 5)) == (2, 5)

def loss(params, batch):
    return jnp.sum(model.apply({'params': params}, batch) ** 2)

value, grads = jax.jit(jax.value_and_grad(loss))(params, batch)
alone, grads_alone = jax.value_and_grad(loss)(jax.device_get(params), np.asarray(batch))
np.testing.assert_allclose(value, alone, rtol=1e-5)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
             jax.device_get(grads), jax.device_get(grads_alone))
try:
    sharding.batch_sharding(mesh, 12)
except UserError as err:
    assert str(err) == (
        "config.batch / config.accumulate = 12 rows do not divide into 8 parts, the product of "
        "replica, data, fsdp in the mesh {'replica': 1, 'data': 2, 'fsdp': 4, 'context': 1, "
        "'tensor': 1}; choose a multiple of 8."), err
else:
    raise AssertionError
shared = sharding.mesh(dict(data=2, context=4))
assert sharding.batch_sharding(shared, 6, 8).shard_shape((6, 8, 5)) == (3, 2, 5)
try:
    sharding.batch_sharding(shared, 6, 10)
except UserError as err:
    assert str(err) == (
        "config.mesh.context=4 does not divide rows of 10 tokens; choose a divisor, or another "
        "length of rows"), err
else:
    raise AssertionError
print('fine')
"""


def test_eight_devices():
    root = os.path.dirname(os.path.dirname(os.path.abspath(sharding.__file__)))
    env = {
        **os.environ,
        "PYTHONPATH": root,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-c", EIGHT],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "fine\n", done.stderr[-3000:]


def test_one_device():
    mesh = sharding.mesh({"data": 1, "fsdp": -1}, jax.devices()[:1])
    assert mesh.size == 1 and sharding.batch_sharding(mesh, 7).shard_shape((7, 3)) == (7, 3)


@pytest.mark.parametrize(
    "sizes, text",
    [
        (
            dict(fdsp=2),
            "config.mesh=dict(fdsp=2): no mesh axis 'fdsp'; axes: replica, data, fsdp, context, t",
        ),
        (dict(data=0), "config.mesh=dict(data=0): data must be at least 1, or -1 for all other"),
        (dict(data=-1, fsdp=-1), "config.mesh=dict(data=-1, fsdp=-1): only one axis can be -1."),
    ],
)
def test_impossible_meshes(sizes, text):
    with pytest.raises(UserError) as err:
        sharding.mesh(sizes)
    assert str(err.value).startswith(text)


def test_unknown_logical_axis():
    import flax.linen as nn

    mesh = sharding.mesh({}, jax.devices()[:1])
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4,), "float32"), ("embde",))
    with pytest.raises(ValueError, match=r"logical axis 'embde'; names: batch, .*mean 'embed'"):
        sharding.shardings({"w": box}, mesh)
