"""The modules that every part of Earmark shares; they import no other part."""
