"""For processes of tests: bitsandbytes is a quarter of a start, and nothing is quantised."""

import sys

sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
