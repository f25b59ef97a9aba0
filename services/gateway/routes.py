"""What the gateway answers on the bus (only how it is) and whom it asks."""

from __future__ import annotations

from libs.common.contracts import messages as m
from libs.common.routing import Routes

SENDS = (
    m.AuthenticateToken,
    m.AuthenticateAttempt,
    m.CreateToken,
    m.RevokeToken,
    m.ListTokens,
    m.CreateSignIn,
    m.RedeemSignIn,
    m.SignOut,
    m.CreateProject,
    m.UpdateProject,
    m.ArchiveProject,
    m.DeleteProject,
    m.RestoreProject,
    m.MoveProject,
    m.GetProject,
    m.ListProjects,
    m.OpenFileset,
    m.SealFileset,
    m.GetFileset,
    m.ListFiles,
    m.GetLog,
    m.StartExperiment,
    m.GetExperiment,
    m.ListExperiments,
    m.SubmitJob,
    m.StopJob,
    m.RetryJob,
    m.CloneJob,
    m.ExplainJob,
    m.GetJob,
    m.ListJobs,
    m.LogRun,
    m.GetRun,
    m.GetMetrics,
    m.RegisterModel,
    m.GetModel,
    m.GetModelVersion,
    m.ListModels,
    m.CreateDeployment,
    m.DeleteDeployment,
    m.GetDeployment,
    m.ListDeployments,
    m.ListNodes,
    m.ListMachines,
    m.DrainNode,
    m.CreateNodeToken,
    m.CheckNodeToken,
    m.AdmitNode,
    m.GetService,
)


def routes() -> Routes:
    return Routes("gateway", (), sends=SENDS)
