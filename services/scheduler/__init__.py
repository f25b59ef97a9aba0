"""The scheduler: admits, orders, places, retries and explains.

Owns: experiments, jobs, attempts and their timeline.
Listens to: requests and queries of people through the gateway; OrderJob and HaltJob of serving; what the executor
says of nodes and executions; what the registry says of projects, and asks it when it says nothing.
Emits: Job* and ExperimentCreated events; the commands StartExecution and StopExecution.
Never: talks to Ray, declares an attempt lost by itself, or starts a second one before the first has ended.
"""
