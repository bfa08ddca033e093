"""What training and evaluation share: settings, checkpoints, devices and output."""
