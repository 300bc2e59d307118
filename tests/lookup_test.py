"""A name becomes a thing, or one line."""
import sys

import pytest

from jaxlm.errors import JaxlmError
from jaxlm.lookup import closest, lookup, nearest

TABLE = {'causal': 1, 'masked': 2}


def test_a_known_name_is_its_entry():
  assert lookup(TABLE, 'masked', 'objective') == 2


def test_a_path_is_imported():
  assert lookup(TABLE, 'os.path:join', 'objective').__name__ == 'join'


@pytest.mark.parametrize('name, told', [
    ('casual', "Unknown objective 'casual'. Known: causal, masked; or pass \"module:attribute\". Did you mean "
     "'causal'?"),
    ('xyz', 'Unknown objective \'xyz\'. Known: causal, masked; or pass "module:attribute".'),
    ('nonesuch:x', "Cannot import objective 'nonesuch:x': No module named 'nonesuch'."),
    ('os:nonesuch', "Cannot import objective 'os:nonesuch': module 'os' has no attribute 'nonesuch'."),
    (':x', "Cannot import objective ':x': Empty module name."),
    ('fails:x', "Cannot import objective 'fails:x': oh no."),
])
def test_any_other_name_is_one_line(name, told, tmp_path, monkeypatch):
  (tmp_path / 'fails.py').write_text('raise RuntimeError("oh no\\nand more")\n')
  monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
  with pytest.raises(JaxlmError) as e:
    lookup(TABLE, name, 'objective')
  assert str(e.value) == told


def test_the_nearest_name_is_offered_where_one_is_near():
  assert closest('maskd', TABLE) == 'masked' and closest('qqq', TABLE) is None
  assert nearest('maskd', TABLE) == " Did you mean 'masked'?" and nearest('qqq', TABLE) == ''
