"""``python -m rpcnb``."""

import sys

from rpcnb.command.main import main

sys.exit(main())
