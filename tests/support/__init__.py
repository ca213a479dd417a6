"""Hold what several test files share; a helper that asserts says what differs, as a test does."""

from pkgutil import iter_modules

import pytest

pytest.register_assert_rewrite(*(f"support.{module.name}" for module in iter_modules(__path__)))
