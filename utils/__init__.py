"""Everything around the network: options, checkpoints, run folders, distributed launch, figures."""

import sys

if sys.platform == "win32":  # Windows lacks file locks by fcntl and signals to a process
    sys.exit("error: the scripts need Linux or macOS; on Windows, run them in WSL2 (https://learn.microsoft.com/windows/wsl)")
