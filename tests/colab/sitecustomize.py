"""Makes a Python look like Colab's to the course, which knows it by this module: `make colab` puts the folder on its path."""

import sys
import types

sys.modules["google.colab"] = types.ModuleType("google.colab")
