-- The record of deploys. Deploy runs this file itself, before all others.

create table if not exists deploy.migrations (
    origin text not null,
    name text not null,
    applied_at timestamptz not null default now(),
    constraint migrations_pkey primary key (origin, name),
    constraint origin_is_known check (origin in ('surety', 'procrastinate'))
);
comment on table deploy.migrations is
'The deltas this database holds, our own and those of Procrastinate''s package; a fresh database holds them all.';

create table if not exists deploy.deploys (
    id bigint generated always as identity,
    deployed_at timestamptz not null default now(),
    deployed_by text not null default session_user,
    version text not null,
    procrastinate_version text not null,
    digest text not null,
    migrations text[] not null,
    written text[] not null,
    dropped text[] not null,
    constraint deploys_pkey primary key (id)
);
comment on table deploy.deploys is
'Every deploy with changes: its migrations, the views and triggers that it wrote, the objects that it dropped.';

create table if not exists deploy.objects (
    kind text not null,
    identity text not null,
    statement text not null,
    definition text not null,
    constraint objects_pkey primary key (kind, identity),
    constraint kind_is_known check (kind in ('view', 'trigger'))
);
comment on table deploy.objects is
'Views and triggers as they were written and as PostgreSQL prints them: only those that differ are written again.';
