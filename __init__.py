"""Where this clone is a folder called `lm` below the working directory, `import lm` is the package.

Python would take the clone for it, find nothing in it, and say so of each name in turn.
"""

import os

__path__ = [os.path.join(os.path.dirname(__file__), "lm")]
__file__ = os.path.join(__path__[0], "__init__.py")
with open(__file__, encoding="utf-8") as _file:
    exec(compile(_file.read(), __file__, "exec"))
