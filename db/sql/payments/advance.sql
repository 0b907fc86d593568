-- Advancing: the steps that lead from a payment's state to the derived one.
--
--   report_excesses         opens discrepancies for amounts beyond what was asked for or captured
--   report_contradictions   opens discrepancies for facts that no step can follow; emits an event to cancel an intent
--   missing_steps           the steps between a payment and its target: mandatory ones not yet made, then a direct one
--   advance_payments        writes those steps, the amounts and the polling time

create or replace function surety.newest_fact(p_payment_id text, p_kinds text) returns text
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select max(facts.id)
    from surety.facts
    where
        facts.payment_id = p_payment_id and facts.disregarded is null
        and facts.kind ~ coalesce(p_kinds, '');
end;

comment on function surety.newest_fact(text, text) is
'The id of the newest fact of a payment that counts; p_kinds is a regular expression for its kind, null for any.';

create or replace function surety.report_excesses(p_derived surety.derived[], p_at timestamptz) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Each kind of excess has a subject of its own: one may be explained, and another come later.
declare
    -- These bounds exclude partitions before a statement begins.
    v_first_payment text := (select min(d.payment_id collate "C") from unnest(p_derived) as d);
    v_last_payment text := (select max(d.payment_id collate "C") from unnest(p_derived) as d);
begin
    if exists (
        select from unnest(p_derived) as d
        where d.excess_minor > 0 or d.over_refunded_minor > 0
            or (d.refunded_minor > 0 and d.at_risk_minor + d.reversed_minor > 0)
    ) then
        perform surety.open_discrepancy(
            'amount', d.payment_id || ':captured', 'critical',
            format('%s more was captured than was asked for', d.excess_minor),
            jsonb_build_array(
                surety.differing_amount('captured', d.captured_minor, d.captured_minor + d.excess_minor)),
            d.payment_id, surety.newest_fact(d.payment_id, '^captured$'), p_at, p_payment_id => d.payment_id)
        from unnest(p_derived) as d
        where d.excess_minor > 0
        order by d.payment_id;
        perform surety.open_discrepancy(
            'amount', d.payment_id || ':refunded', 'critical',
            format('%s more was refunded than was captured', d.over_refunded_minor),
            jsonb_build_array(
                surety.differing_amount('refunded', d.captured_minor, d.captured_minor + d.over_refunded_minor)),
            d.payment_id, surety.newest_fact(d.payment_id, '^refund'), p_at, p_payment_id => d.payment_id)
        from unnest(p_derived) as d
        where d.over_refunded_minor > 0
        order by d.payment_id;
        -- Rates move between a charge and its dispute, so a dispute alone may exceed the captured amount.
        perform surety.open_discrepancy(
            'amount', d.payment_id || ':disputed', 'critical',
            format(
                '%s was refunded and %s disputed or returned, of %s',
                d.refunded_minor, d.at_risk_minor + d.reversed_minor, d.captured_minor),
            jsonb_build_array(surety.differing_amount(
                'refunded and disputed', d.captured_minor, d.refunded_minor + d.at_risk_minor + d.reversed_minor)),
            d.payment_id, surety.newest_fact(d.payment_id, '^(dispute|returned|contested)'), p_at,
            p_payment_id => d.payment_id)
        from unnest(p_derived) as d
        where d.refunded_minor > 0 and d.at_risk_minor + d.reversed_minor > 0
            and d.refunded_minor + d.at_risk_minor + d.reversed_minor > d.captured_minor
        order by d.payment_id;
    end if;

    perform surety.close_discrepancies(
        'amount', array_agg(judged.subject), 'refunds and disputes fit the captured amount again', p_at)
    from unnest(p_derived) as d join surety.payments as p on p.id = d.payment_id
    cross join lateral (
        values
        (
            d.payment_id || ':refunded',
            p.captured_minor > 0 and p.refunded_minor >= p.captured_minor and d.over_refunded_minor = 0
        ),
        (
            d.payment_id || ':disputed',
            p.at_risk_minor + p.reversed_minor > 0
            and d.refunded_minor + d.at_risk_minor + d.reversed_minor <= d.captured_minor
        )
    ) as judged (subject, fits)
    where p.id between v_first_payment and v_last_payment and judged.fits
    having count(*) > 0;
end;
$$;

comment on function surety.report_excesses(surety.derived[], timestamptz) is
'Opens a critical discrepancy for each payment whose captured, refunded or disputed amounts exceed the asked or captured
one, and closes it when they fit again. A dispute alone may exceed the captured amount. The payments are locked and not
advanced yet.';

create or replace function surety.report_contradictions(p_derived surety.derived[], p_at timestamptz) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_ended record;
    v_opened text;
    v_types text [] := '{}';
    -- These bounds exclude partitions before a statement begins.
    v_first_payment text := (select min(d.payment_id collate "C") from unnest(p_derived) as d);
    v_last_payment text := (select max(d.payment_id collate "C") from unnest(p_derived) as d);
begin
    -- The payment has ended here, and at the provider it is live. No step leads there. Failed or canceled is one end:
    -- an intent that was canceled after a failed attempt does not always name the attempt's error.
    for v_ended in
        select p.id, p.version, p.state, d.target_state, p.provider_id is distinct from d.provider_id as is_another
        from unnest(p_derived) as d join surety.payments as p on p.id = d.payment_id
        where p.id between v_first_payment and v_last_payment
            and p.state in ('failed', 'canceled') and d.captured_minor = 0
            and d.target_state not in ('failed', 'canceled')
        order by p.id
    loop
        v_opened := null;
        if v_ended.target_state <> 'provider_submitted' then
            v_opened := surety.open_discrepancy(
                'state', v_ended.id, 'warning',
                format('%s here, %s at the provider', v_ended.state, v_ended.target_state),
                jsonb_build_array(surety.differing_value('state', v_ended.state, v_ended.target_state)),
                v_ended.id, surety.newest_fact(v_ended.id, null), p_at, p_payment_id => v_ended.id,
                p_data => jsonb_build_object('provider_state', v_ended.target_state));
        end if;
        if v_ended.target_state in ('provider_submitted', 'requires_action', 'authorized', 'processing')
            and (v_ended.is_another or v_opened is not null)
        then
            perform outbox.emit_event(
                'payment', v_ended.id, 'payment.authorized_late',
                jsonb_build_object('payment_id', v_ended.id, 'reason', 'ended'), null, v_ended.version);
            v_types := array['payment.authorized_late'];
        end if;
    end loop;

    -- What was live at the provider has ended there as well.
    perform surety.close_discrepancies(
        'state', array_agg(p.id), format('it is %s at the provider', d.target_state), p_at)
    from unnest(p_derived) as d join surety.payments as p on p.id = d.payment_id
    where p.id between v_first_payment and v_last_payment
        and p.state in ('failed', 'canceled') and d.target_state in ('failed', 'canceled')
    group by d.target_state
    order by d.target_state;
    perform surety.report_excesses(p_derived, p_at);
    return v_types;
end;
$$;

comment on function surety.report_contradictions(surety.derived[], timestamptz) is
'Opens discrepancies for payments whose facts contradict their state: the payment has ended, but not at the provider; an
amount exceeds the requested or captured one. Closes them when the provider''s object has ended, or the amounts fit
again. Emits payment.authorized_late if the provider''s intent must be canceled. The payments are locked and not
advanced yet. Returns the types of the events that it emitted.';

create or replace function surety.missing_steps(
    p_rail text, p_capture_method text, p_state text, p_target_state text, p_visited text[], p_evidenced text[],
    p_has_ended boolean, p_is_captured boolean, p_is_settled boolean, p_is_lost boolean,
    p_is_refunded_otherwise boolean
) returns table (ordinal integer, state text)
language sql stable
begin atomic
    -- No set clause, so that PostgreSQL can inline the function.
    select
        mandatory.position,
        mandatory.state
    from surety.mandatory_steps as mandatory
    where
        mandatory.rail = p_rail and mandatory.capture_method = p_capture_method
        and mandatory.state <> all(p_visited)
        and case
            -- A payment that ended here and then succeeded continues from confirmed, without the earlier steps.
            when p_is_captured and p_visited && array['failed', 'canceled']
                then mandatory.position = 5 or (mandatory.position = 6 and p_is_settled)
            when p_is_captured then mandatory.position <= 5 or p_is_settled
            else
                not p_has_ended
                and (
                    mandatory.position <= 3 or mandatory.state = p_target_state
                    -- On the way to a final state, the fourth step is made only if a fact proves it.
                    or (
                        mandatory.position = 4 and mandatory.state = any(p_evidenced)
                        and p_target_state <> p_state
                    )
                )
        end
    union all
    -- A payment lost to a dispute passes through disputed first.
    select
        90,
        'disputed'
    where p_target_state = 'reversed' and p_is_lost and p_state not in ('disputed', 'reversed')
    union all
    -- The target itself, unless the payment stands there or a mandatory step leads there.
    select
        99,
        p_target_state
    where
        (p_is_captured or not p_has_ended)
        and (
            p_target_state <> p_state
            or (p_target_state = 'partially_refunded' and p_is_refunded_otherwise)
            or (p_is_settled and p_target_state <> 'settled' and 'settled' <> all(p_visited))
        )
        and not exists (
            select from surety.mandatory_steps as mandatory
            where
                mandatory.rail = p_rail and mandatory.capture_method = p_capture_method
                and mandatory.state = p_target_state and mandatory.state <> all(p_visited)
        );
end;

comment on function surety.missing_steps(
    text, text, text, text, text[], text[], boolean, boolean, boolean, boolean, boolean
) is
'The steps from a payment''s state to its target, by their ordinal. A payment makes every mandatory step of its path
once. No row if it stands at its target, or has ended and nothing was captured.';

create or replace function surety.advance_payments(
    p_derived surety.derived[], p_cause text, p_actor text, p_request_id text, p_causes jsonb default '{}'
) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
declare
    v_now timestamptz := surety.time_now();
    v_types text [] := surety.report_contradictions(p_derived, v_now);
    -- These bounds exclude partitions before a statement begins.
    v_first_payment text := (select min(d.payment_id collate "C") from unnest(p_derived) as d);
    v_last_payment text := (select max(d.payment_id collate "C") from unnest(p_derived) as d);
    v_proved text [];
begin
    with targets as materialized (
        select
            d.*, p.id, p.version, p.state, p.rail, p.capture_method,
            d.refunded_minor <> p.refunded_minor as is_refunded_otherwise,
            array(
                select s.to_state from surety.steps as s
                where s.payment_id = p.id and s.payment_id between v_first_payment and v_last_payment
            ) as visited,
            array[p.captured_minor, p.refunded_minor, p.refund_pending_minor, p.at_risk_minor, p.reversed_minor]
            = array[d.captured_minor, d.refunded_minor, d.refund_pending_minor, d.at_risk_minor, d.reversed_minor]
            and p.provider_id is not distinct from d.provider_id
            and (p.next_action is not distinct from d.next_action or d.target_state <> 'requires_action')
            and p.failure is not distinct from d.failure as is_same
        from unnest(p_derived) as d join surety.payments as p on p.id = d.payment_id
        where p.id between v_first_payment and v_last_payment
    ),
    -- A row per step to make, numbered; a row without a step for a payment that stands at its target.
    path as materialized (
        select
            t.id, t.version, t.state as from_first, t.evidenced, t.is_settled, t.target_state,
            way.ordinal, way.state, row_number() over w as n, lag(way.state, 1, t.state) over w as from_state,
            t.is_same, t.captured_minor, t.refunded_minor, t.refund_pending_minor, t.at_risk_minor, t.reversed_minor,
            t.provider_id, t.next_action, t.failure
        from targets as t
        left join lateral surety.missing_steps(
            p_rail => t.rail, p_capture_method => t.capture_method, p_state => t.state,
            p_target_state => t.target_state, p_visited => t.visited, p_evidenced => t.evidenced,
            p_has_ended => t.state in ('failed', 'canceled'), p_is_captured => t.captured_minor > 0,
            -- Money that arrives after a loss makes no step: the payment is not paid.
            p_is_settled => t.is_settled and t.target_state <> 'reversed', p_is_lost => t.is_lost,
            p_is_refunded_otherwise => t.is_refunded_otherwise
        ) as way on true
        window w as (partition by t.id order by way.ordinal)
    ),
    walked as (
        insert into surety.steps (payment_id, version, from_state, to_state, cause, implied, at, actor, request_id)
        select
            path.id, path.version + path.n::integer, path.from_state, path.state,
            coalesce(p_causes ->> path.id, p_cause),
            path.state <> path.target_state and path.state <> all(coalesce(path.evidenced, '{}'))
            and not (path.state = 'settled' and path.is_settled),
            v_now, p_actor, p_request_id
        from path where path.state is not null
        order by path.id, path.ordinal
        returning payment_id, to_state
    ),
    -- State and amounts in one update: the steps' trigger finds the projection already made.
    projected as (
        update surety.payments as p
        set version = t.version + case when t.state is null then 0 else t.n::integer end,
            state = coalesce(t.state, p.state),
            captured_minor = t.captured_minor, refunded_minor = t.refunded_minor,
            refund_pending_minor = t.refund_pending_minor, at_risk_minor = t.at_risk_minor,
            reversed_minor = t.reversed_minor, provider_id = coalesce(t.provider_id, p.provider_id),
            next_action = case when coalesce(t.state, p.state) = 'requires_action' then t.next_action end,
            -- A refused creation leaves no fact, so the derived failure is null: keep the stored one.
            failure = case
                when p.state = 'failed' and t.captured_minor = 0 then coalesce(t.failure, p.failure) else t.failure
            end,
            updated_at = v_now,
            poll_at = case when t.state is null then p.poll_at else v_now + s.poll_after end,
            poll_count = case when t.state is null then p.poll_count else 0 end
        from (select distinct on (path.id) path.* from path order by path.id, path.ordinal desc) as t
        left join surety.states as s on s.state = t.state
        where p.id = t.id and p.id between v_first_payment and v_last_payment
            and (not t.is_same or t.state is not null)
    )
    select
        v_types || coalesce(array_agg(distinct 'payment.' || w.to_state), '{}'),
        array_agg(w.payment_id) filter (where w.to_state in ('authorized', 'confirmed'))
    into v_types, v_proved
    from walked as w;

    if v_proved is not null then
        perform outbox.emit_event(
            'payment', p.id, 'payment.method_usable', jsonb_build_object('payment_id', p.id), null, null)
        from surety.payments as p
        where p.id = any(v_proved) and p.save_method is not null and p.id between v_first_payment and v_last_payment;
        if found then
            v_types := v_types || array['payment.method_usable'];
        end if;
    end if;

    -- The settlement of a payment with a loss is met by its money, without the step. Once: its posting comes next.
    perform outbox.emit_event(
        'payment', d.payment_id, 'payment.money_available', jsonb_build_object('payment_id', d.payment_id), null, null)
    from unnest(p_derived) as d
    where d.is_settled and d.target_state = 'reversed'
        and not exists (select from ledger.postings as g where g.cause = d.payment_id || ':settled');
    if found then
        v_types := v_types || array['payment.money_available'];
    end if;
    return v_types;
end;
$$;

comment on function surety.advance_payments(surety.derived[], text, text, text, jsonb) is
'Brings payments, already locked, to the states and amounts derived from their facts: the mandatory steps not yet made,
then one direct step. A payment with a loss never settles: payment.money_available is emitted when its money is there.
p_cause is written to the steps, or the payment''s own cause in p_causes, by its id; p_request_id may be null. Returns
the types of the events made.';
