"""What the tests share: images, commands, processes, file systems. No test is in here."""
