"""`python -m vllm_wkvquant`: the command `wkvquant`."""

import sys

from vllm_wkvquant.cli import main

sys.exit(main())
