"""Hold what several test files share; a helper that asserts says what differs, as a test does."""

import sys
from pkgutil import iter_modules

if pytest := sys.modules.get("pytest"):  # the checks of a GPU come without it
    pytest.register_assert_rewrite(*(f"support.{module.name}" for module in iter_modules(__path__)))
