-- Handlers, by operators: a paused handler takes no events. They wait.

create or replace function outbox.set_handler_paused(
    p_handler text, p_is_paused boolean, p_reason text, p_actor text default session_user
) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with changed as (
        update outbox.handlers
        set paused_at = case when p_is_paused then surety.time_now() end
        where handlers.handler = p_handler and (handlers.paused_at is not null) <> p_is_paused
        returning handlers.handler
    ),

    audited as (
        select changed.handler
        from changed
        cross join lateral audit.write_entry(
            'operator', 'operator:' || p_actor, case when p_is_paused then 'handler paused' else 'handler resumed' end,
            p_reason,
            p_snapshot => jsonb_build_object('handler', changed.handler)
        )
    )

    select (select count(*) > 0 from audited)
    from outbox.handlers cross join surety.await_standbys()
    where handlers.handler = p_handler;
end;

comment on function outbox.set_handler_paused(text, boolean, text, text) is
'Pauses a handler, or resumes it with p_is_paused false, and audits it. False if nothing changed, null if there is no
such handler. A batch that is under way is finished. A worker schedules a resumed handler within a second.';
