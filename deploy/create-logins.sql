-- The logins of the processes and their database: run by psql as a superuser, once, and again to change passwords. No
-- login is a superuser, and none may create roles or databases. `surety deploy` then needs only login_deploy, which owns
-- the database.
--
--     SURETY_SECRETS=/etc/surety/secrets psql --no-psqlrc --file deploy/create-logins.sql postgres
--
-- The passwords are those of the addresses that make-secrets.sh wrote.

\set ON_ERROR_STOP on
\set QUIET on
\pset format unaligned
\pset tuples_only on
\set deploy_password `sed -n 's|^.*:\([0-9a-f]*\)@.*$|\1|p' "${SURETY_SECRETS:-/run/secrets}/deploy-database-url"`
\set api_password `sed -n 's|^.*:\([0-9a-f]*\)@.*$|\1|p' "${SURETY_SECRETS:-/run/secrets}/api-database-url"`
\set webhook_password `sed -n 's|^.*:\([0-9a-f]*\)@.*$|\1|p' "${SURETY_SECRETS:-/run/secrets}/webhook-database-url"`
\set worker_password `sed -n 's|^.*:\([0-9a-f]*\)@.*$|\1|p' "${SURETY_SECRETS:-/run/secrets}/worker-database-url"`
\set analyst_password `sed -n 's|^.*:\([0-9a-f]*\)@.*$|\1|p' "${SURETY_SECRETS:-/run/secrets}/analyst-database-url"`
\set auditor_password `sed -n 's|^.*:\([0-9a-f]*\)@.*$|\1|p' "${SURETY_SECRETS:-/run/secrets}/auditor-database-url"`

-- Statements with passwords are in no log.
set log_statement = 'none';
set log_min_duration_statement = -1;
set log_min_error_statement = 'panic';
set client_min_messages = 'warning';

create temporary table logins (kind text not null, password text not null check (length(password) >= 32));
insert into logins (kind, password) values
('deploy', :'deploy_password'),
('api', :'api_password'),
('webhook', :'webhook_password'),
('worker', :'worker_password'),
('analyst', :'analyst_password'),
('auditor', :'auditor_password');

select format('create role surety_%s nologin', r.kind)
from (values ('owner'), ('api'), ('webhook'), ('worker'), ('analyst'), ('auditor')) as r (kind)
where not exists (select from pg_roles where rolname = 'surety_' || r.kind)
\gexec

select format('create role login_%s', l.kind)
from logins as l
where not exists (select from pg_roles where rolname = 'login_' || l.kind)
\gexec

select format(
    'alter role login_%s with login nosuperuser nocreaterole nocreatedb noreplication nobypassrls password %L', l.kind,
    l.password
)
from logins as l
\gexec

-- The one that deploys may act as each role. It runs the operators' commands as well.
grant surety_owner, surety_api, surety_webhook, surety_worker, surety_analyst, surety_auditor to login_deploy;
grant surety_api to login_api;
grant surety_webhook to login_webhook;
grant surety_worker to login_worker;
grant surety_analyst to login_analyst;
grant surety_auditor to login_auditor;

-- `surety status` shows the transactions of other logins.
grant pg_read_all_stats to surety_owner;

select 'create database surety owner login_deploy template template0 encoding ''UTF8'' locale ''C'''
where not exists (select from pg_database where datname = 'surety')
\gexec

revoke all on database surety from public;
grant connect on database surety
to login_deploy, login_api, login_webhook, login_worker, login_analyst, login_auditor;
