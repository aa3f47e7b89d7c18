"""What the compilers of TPUs and GPUs made of a program, without one attached."""
