"""The benchmark of codes: its cases, and that both sides do the same maths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from emc2.experiments.benchmarks import compression, harness

_KEY = jax.random.key(0)


class CompressionBenchTest(parameterized.TestCase):
  def test_cases_have_names_of_their_own_and_smoke_is_a_part(self):
    names = {}
    for smoke in (True, False):
      names[smoke] = [case.name for case in compression.cases(smoke)]
      self.assertLen(set(names[smoke]), len(names[smoke]))
    self.assertEqual(names[True], names[False])

  @parameterized.parameters(
    ('top_k', 0.1), ('sign', 0), ('bfloat16', 0), ('power_sgd', 3)
  )
  @pytest.mark.slow
  def test_plain_form_is_the_code(self, name, value):
    x = jax.random.normal(_KEY, (20, 30))
    code = compression._code(name, value)
    state = code.init(x.shape, x.dtype, jax.random.key(1))
    q = None
    if name == 'power_sgd':
      # From anywhere, a matrix of that rank is met at once.
      left, right = jnp.split(jax.random.normal(_KEY, (3, 50)), [20], axis=1)
      x = jnp.matmul(left.T, right, precision='highest')
      q = jax.random.normal(jax.random.key(2), (30, value))
    sent = compression.compression.reduce(code, [state], [x], [_KEY]).sent[0]
    expected, _ = compression._plain(name, value)(x, _KEY, q)
    np.testing.assert_allclose(sent, expected, rtol=1e-4, atol=1e-4)

  @parameterized.parameters('code', 'plain')
  def test_a_step_keeps_what_it_does_not_send(self, side):
    call = compression.CASES[side](name='top_k', value=0.1, side=16)
    sent, memory, *_ = call()
    total = sum(compression._draw(16))
    np.testing.assert_allclose(sent + memory, total, rtol=1e-6, atol=1e-6)
    self.assertEqual(np.count_nonzero(sent), 25)

  def test_feedback_adds_and_clears(self):
    call = compression.time_feedback(fraction=0.1, side=73)
    grad, memory = (np.asarray(x) for x in compression._draw(73))
    for _ in range(2):
      values, indices = call()
      memory = memory + grad
      flat = memory.reshape(-1)
      largest = np.argsort(-np.abs(flat))[: indices.size]
      np.testing.assert_array_equal(np.sort(indices), np.sort(largest))
      np.testing.assert_array_equal(values, flat[np.asarray(indices)])
      flat[largest] = 0

  @pytest.mark.slow
  def test_rows_of_the_wire(self):
    with harness.Context(smoke=True) as context:
      case = next(c for c in compression.cases(True) if c.name == 'wire')
      rows = {row.name: row.ours.value for row in case.run(context)}
    self.assertEqual(rows['wire: sign'], (512**2 + 32) / 512**2)
    self.assertEqual(rows['wire: bfloat16'], 16)


if __name__ == '__main__':
  absltest.main()
