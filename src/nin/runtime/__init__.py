"""What the machine and the operating system offer: devices, processes, clocks, files."""
