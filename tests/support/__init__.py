"""Hold what several test files share; a helper that asserts says what differs, as a test does."""

import pytest

pytest.register_assert_rewrite("support")
