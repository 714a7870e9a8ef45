"""What the property tests of the readers share: how many cases they try, and what each case asserts."""
import os
import resource
import shutil

import pytest
from hypothesis import HealthCheck, settings

from common import UserError

# hypothesis counts the 10 s; CASES=50 in the environment tries fewer
MANY = settings(max_examples=int(os.environ.get("CASES", 2000)), deadline=10_000, suppress_health_check=list(HealthCheck))


class Cases:
    """Made-up files in `folder`, below `root`, and what is wanted of a reader of them."""

    def __init__(self, root):
        self.root, self.folder, self.count = root, root / "case", 0

    def fresh(self):
        """The folder, made empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return self.folder

    def check(self, read, *names):
        """read() returns, or raises one line with one of `names`; it writes nothing."""
        self.count += 1
        before = sorted(self.root.rglob("*"))
        try:
            read()
        except UserError as e:
            assert "\n" not in str(e) and any(name in str(e) for name in names), str(e)
        assert sorted(self.root.rglob("*")) == before


@pytest.fixture
def cases(tmp_path, monkeypatch, capfd, request):
    """Cases; at the end their number is printed, and memory must have grown by less than 2 GB."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    found, memory = Cases(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield found
    with capfd.disabled():
        print(f"\n{request.node.name}: {found.count} cases")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2e6  # kB
