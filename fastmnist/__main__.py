"""`python -m fastmnist`, the same as the command `fastmnist`."""

import sys

from fastmnist.cli.main import main

sys.exit(main())
