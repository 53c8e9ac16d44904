"""Workers on one device, on eight, two on each of four, in two processes."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import mesh as mesh_lib
from emc2.compression import sparse
from emc2.consensus import qsparse, qsparse_local, schedules

from tests import processes
from tests.consensus import oracle, trains_qsparse

P = jax.sharding.PartitionSpec
EVERY = schedules.every(20, 4)


def _mesh(size):
  return mesh_lib.make(jax.devices()[:size], data=size)


class DevicesTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('payload', 8, dict(exchange='payload')),
    ('together', 8, dict(table=EVERY)),
    ('own_draws', 8, dict(code=oracle.noisy(False))),
  )
  def test_same_as_one_device(self, num_devices, settings):
    self._check_devices(num_devices, settings)

  @parameterized.named_parameters(
    ('dense', 8, dict(exchange='dense')),
    ('two_on_each', 4, {}),
    ('own_draws_two_on_each', 4, dict(code=oracle.noisy(False))),
    ('state_of_a_code', 8, dict(code=sparse.block_k(3), table=EVERY)),
  )
  @pytest.mark.slow
  def test_same_as_one_device_elsewhere(self, num_devices, settings):
    self._check_devices(num_devices, settings)

  def _check_devices(self, num_devices, settings):
    alone = dict(settings, exchange='auto')
    want, want_bits = trains_qsparse.train(None, None, **alone)
    state, bits = trains_qsparse.train(_mesh(num_devices), 'data', **settings)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, state, want)
    np.testing.assert_array_equal(bits, want_bits)
    self.assertEqual(state.memory.sharding.spec, P('data'))
    self.assertTrue(state.params.is_fully_replicated)

  @pytest.mark.slow
  def test_two_processes(self):
    path = pathlib.Path(self.create_tempdir().full_path) / 'params.npy'
    processes.run('tests.consensus.trains_qsparse', 2, str(path))
    want, _ = trains_qsparse.train(None, None)
    np.testing.assert_allclose(np.load(path), want.params, rtol=1e-5, atol=1e-6)

  def test_payloads_need_one_worker_on_each(self):
    with self.assertRaisesRegex(NotImplementedError, 'one worker on each'):
      trains_qsparse.train(_mesh(4), 'data', exchange='payload')


class SumCode:
  """A code that reduces by itself: it sends the mean over entries."""

  @staticmethod
  def make():
    def reduce(states, xs, keys, axis_name):
      del keys
      mean = [jnp.mean(x) for x in xs]
      total = [jax.lax.pmean(m, axis_name) for m in mean]
      fill = lambda ms: [
        jnp.full(x.shape, m) for x, m in zip(xs, ms, strict=True)
      ]
      return qsparse.compression.Reduced(fill(mean), fill(total), states)

    return oracle.everything()._replace(reduce=reduce)


class CollectivesTest(parameterized.TestCase):
  """Steps without an upload exchange nothing; others what they must."""

  def _text(self, num_devices=8, **settings):
    settings = dict(code=oracle.largest(1)) | settings
    method = qsparse_local(
      lambda params, target: 0.5 * jnp.sum((params - target) ** 2),
      oracle.sgd(0.1, 0.9),
      settings.pop('code'),
      EVERY,
      num_workers=8,
      axis_name='data',
      **settings,
    )
    key = jax.random.key(0)
    state = jax.eval_shape(method.init, key, jnp.zeros(20))
    specs = qsparse.shardings()
    step = jax.shard_map(
      method.step,
      mesh=_mesh(num_devices),
      in_specs=(P(), specs, P('data')),
      out_specs=(specs, P('data')),
    )
    batch = jax.ShapeDtypeStruct((8, 20), jnp.float32)
    return jax.jit(step).lower(key, state, batch).compile().as_text()

  def _count(self, text):
    found = re.findall(r' (all-gather|all-reduce|\S+-permute)\(', text)
    entry = text[text.index('\nENTRY') :]
    self.assertNotRegex(entry, 'all-gather|all-reduce|permute|all-to-all')
    return {name: found.count(name) for name in set(found)}

  @parameterized.parameters(
    # 8 x 64 bits are fewer than 2 x 32 x 20; 8 x 256 are more.
    ('auto', oracle.largest(1), {'all-gather': 2}),
    ('auto', oracle.largest(4), {'all-reduce': 1}),
    ('payload', oracle.largest(4), {'all-gather': 2}),
    ('dense', oracle.largest(1), {'all-reduce': 1}),
    ('auto', oracle.everything(), {'all-reduce': 1}),
  )
  def test_upload(self, exchange, code, want):
    self.assertEqual(
      self._count(self._text(exchange=exchange, code=code)), want
    )

  def test_shared_entries_alone_travel(self):
    text = self._text(code=sparse.block_k(3))
    self.assertEqual(self._count(text), {'all-reduce': 1})
    self.assertRegex(text, r'f32\[3\]\S* all-reduce\(')

  def test_moments(self):
    text = self._text(momentum='average', code=oracle.everything())
    self._count(text)
    # Their sums and how many upload; XLA may join them to the other.
    self.assertRegex(text, r'f32\[21\].* all-reduce\(')

  def test_several_on_a_device(self):
    self.assertEqual(self._count(self._text(num_devices=4)), {'all-reduce': 1})


class OwnReductionTest(parameterized.TestCase):
  def test_same_as_one_device(self):
    settings = dict(code=SumCode.make(), table=EVERY)
    want, _ = trains_qsparse.train(None, None, **settings)
    state, _ = trains_qsparse.train(_mesh(8), 'data', **settings)
    np.testing.assert_allclose(state.params, want.params, rtol=1e-5, atol=1e-6)
    self.assertLess(np.ptp(state.params), 1e-6)
    with self.assertRaisesRegex(NotImplementedError, 'one worker on each'):
      trains_qsparse.train(_mesh(4), 'data', **settings)
