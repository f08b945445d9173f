"""What people see: the dataset card, the contact sheet, live progress."""
