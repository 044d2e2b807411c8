"""What is shown and noted while a run goes on; nothing here changes a result."""
