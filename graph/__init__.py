"""What a program is: capture, linear sites, custom ops, equivalence, hierarchy."""
