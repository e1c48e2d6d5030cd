"""What the original trainer's configuration says, in our words."""
