from mpi4py import MPI

job = MPI.COMM_WORLD
if job.rank == 0:
    print("one MPI job of", job.size, "processes")
