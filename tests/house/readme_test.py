"""What the README shows runs, and what it points to is there."""

import pathlib
import re

import jax
from absl.testing import absltest

ROOT = pathlib.Path(__file__).parents[2]


class ReadmeTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.text = (ROOT / 'README.md').read_text()

  def test_snippets_run(self):
    snippets = re.findall(r'```python\n(.*?)```', self.text, re.DOTALL)
    self.assertNotEmpty(snippets)
    for snippet in snippets:
      # As a user has it: JAX's own defaults.
      with (
        jax.numpy_dtype_promotion('standard'),
        jax.numpy_rank_promotion('allow'),
      ):
        exec(compile(snippet, 'README.md', 'exec'), {'__name__': 'readme'})

  def test_links_lead_somewhere(self):
    links = re.findall(r'\]\((?!https?://)([^)#]+)', self.text)
    self.assertNotEmpty(links)
    for link in links:
      self.assertTrue((ROOT / link).exists(), link)
