"""What every part of Earmark shares; imports nothing else of ours."""
