"""``python -m fastnst VERB ...``, the same as the installed command ``fastnst VERB ...``."""

from fastnst.cli import main

main()
