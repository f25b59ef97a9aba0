"""What storage does by itself: keeps the bucket there, compacts and seals logs, sweeps file sets.

Each step records nothing before it has acted and can be repeated: keys follow from ids and sequences, so writing or
removing an object twice is the same as once. Rows are gone through in turns, a bounded number a pass, each pass from
where the last one stopped: one that fails each time holds up none of the others.
"""
