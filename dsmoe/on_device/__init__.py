"""All that is to be measured on an attached GPU, in one session of minutes, into one file."""
