"""Signs with a scale lose what the formula says; votes are counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2 import mesh
from emc2.compression import compressor, sign


@functools.cache
def _program(code):
  def run(x):
    payload, state = code.compress((), x, None)
    return code.decompress(state, payload, jax.ShapeDtypeStruct.like(x))

  return jax.jit(run)


def _ends_in(code, x):
  """What an array is after it has been sent."""
  return _program(code)(jnp.asarray(x))


class ScaledSignTest(parameterized.TestCase):
  def test_what_is_lost(self):
    with jax.enable_x64(True):
      x = np.random.default_rng(0).normal(size=(9, 11))
      found = np.asarray(_ends_in(sign.scaled_sign(), x))
      want = np.sum(x**2) - np.sum(np.abs(x)) ** 2 / x.size
      self.assertAlmostEqual(np.sum((found - x) ** 2) / want, 1, places=12)

  def test_zero_counts_as_plus(self):
    x = np.array([0, -0.0, 3, -5], np.float32)
    found = _ends_in(sign.scaled_sign(), x)
    np.testing.assert_array_equal(found, [2, 2, 2, -2])

  @parameterized.parameters(1, 1.5, 2, 3, 8)
  def test_norms(self, norm):
    x = np.random.default_rng(0).normal(size=50).astype(np.float32)
    scale = np.sum(np.abs(x) ** norm) ** (1 / norm) / 50
    code = sign.scaled_sign(norm=norm)
    np.testing.assert_allclose(_ends_in(code, x), scale * np.sign(x), rtol=1e-5)
    # Powers of such numbers leave the range of float32.
    found = _ends_in(code, x * np.float32(1e30))
    np.testing.assert_allclose(found, 1e30 * scale * np.sign(x), rtol=1e-5)

  def test_one_entry_reaches_the_bound(self):
    x = np.eye(1, 40, dtype=np.float32)
    lost = np.sum((np.asarray(_ends_in(sign.scaled_sign(), x)) - x) ** 2)
    self.assertAlmostEqual(lost, 1 - sign.scaled_sign().delta((1, 40)), 5)

  @parameterized.parameters(0.5, float('nan'), float('inf'))
  def test_refuses(self, norm):
    with self.assertRaisesRegex(ValueError, 'norm must be at least 1, got'):
      sign.scaled_sign(norm=norm)


def _vote(code, rows):
  """Reduces rows (workers, d), one a worker."""

  def run(rows):
    reduced = compressor.reduce(
      code, [()], [rows[0]], [jax.random.key(0)], mesh.DATA
    )
    return reduced.sent[0][None], reduced.mean[0]

  workers = len(rows)
  split = jax.P(mesh.DATA)
  devices = mesh.make(jax.devices()[:workers], data=workers)
  return jax.jit(
    jax.shard_map(run, mesh=devices, in_specs=split, out_specs=(split, jax.P()))
  )(rows)


class MajorityVoteTest(parameterized.TestCase):
  @parameterized.parameters((None, 4), (None, 3), (4, 4), (5, 3))
  def test_workers(self, num_workers, workers):
    rows = np.random.default_rng(0).normal(size=(workers, 70))
    rows = rows.astype(np.float32)
    rows[:, 0] = 0
    sent, mean = _vote(sign.majority_vote(num_workers), jnp.asarray(rows))
    votes = np.where(rows >= 0, 1, -1)
    np.testing.assert_array_equal(sent, votes)
    np.testing.assert_array_equal(mean, np.sign(votes.sum(axis=0)))
    self.assertEqual(bool(np.any(np.asarray(mean) == 0)), workers == 4)

  def test_integers_hold_the_votes(self):
    for num, dtype, bits in [(127, jnp.int8, 8), (128, jnp.int16, 9)]:
      code = sign.majority_vote(num)
      votes, _ = code.compress((), jnp.ones(3), None)
      self.assertEqual(votes.dtype, dtype)
      self.assertEqual(code.bits((3,)), 3 * bits)
      self.assertTrue(code.allreducible)

  def test_alone(self):
    x = jnp.array([0.5, -2, 0])
    reduced = compressor.reduce(
      sign.majority_vote(), [()], [x], [jax.random.key(0)]
    )
    np.testing.assert_array_equal(reduced.mean[0], [1, -1, 1])

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, 'num_workers must be at least 1'):
      sign.majority_vote(0)
    with self.assertRaisesRegex(
      ValueError, 'at least the 4 of the axis, got 3'
    ):
      _vote(sign.majority_vote(3), jnp.ones((4, 2)))
