"""What the commands of the command line do before and after a framework is asked."""
