"""Options, checkpoints, run folders, distributed launch, figures: all around the network, nothing of the network."""

import sys

if sys.platform == "win32":  # no locks of files (fcntl), no signals to a process
    sys.exit("error: the scripts need Linux or macOS; on Windows, run them in WSL2 (https://learn.microsoft.com/windows/wsl)")
